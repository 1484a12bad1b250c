"""Makers of small prepared sets, in the exact layout that TFDS gives them."""

import io
import json
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import PIL.Image
import pytest

from experiments.data.image_set import ImageSet

Examples = list[dict[str, Any]]


def encode_png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(image.squeeze()).save(buffer, "png")
    return buffer.getvalue()


def frame_tfrecord(records: Iterable[bytes]) -> bytes:
    def checksum(data: bytes) -> bytes:
        crc = google_crc32c.value(data)
        rotated = (crc >> 15) | (crc << 17)
        return struct.pack("<I", (rotated + 0xA282EAD8) % 2**32)

    framed = b""
    for record in records:
        length = struct.pack("<Q", len(record))
        framed += length + checksum(length) + record + checksum(record)
    return framed


def turn_into_tfrecord(directory: Path) -> None:
    """Rewrites a prepared set's shards, since TFDS needs TensorFlow for this form."""
    from array_record.python import array_record_module

    for path in directory.glob("*.array_record-*"):
        reader = array_record_module.ArrayRecordReader(str(path))
        framed = frame_tfrecord(reader.read_all())
        reader.close()
        path.unlink()
        name = path.name.replace(".array_record-", ".tfrecord-")
        (directory / name).write_bytes(framed)
    edit_json(directory / "dataset_info.json", fileFormat="tfrecord")


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def prepare_set(
    data_dir: Path,
    splits: Mapping[str, Examples],
    features: Mapping[str, Any],
    *,
    name: str = "tiny",
    config: str | None = None,
    supervised_keys: Any = ("image", "label"),
    file_format: str = "array_record",
    num_shards: int = 1,
) -> Path:
    """Prepares a set that is registered nowhere; returns its version's directory."""
    import tensorflow_datasets as tfds

    set_name = name
    with tfds.core.registered.skip_registration():

        class Builder(tfds.core.GeneratorBasedBuilder):
            name = set_name
            VERSION = tfds.core.Version("1.0.0")
            BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config)] if config else []

            def _info(self):
                return tfds.core.DatasetInfo(
                    builder=self,
                    features=tfds.features.FeaturesDict(features),
                    supervised_keys=supervised_keys,
                )

            def _split_generators(self, dl_manager):
                return {split: self._generate_examples(split) for split in splits}

            def _generate_examples(self, split):
                yield from enumerate(splits[split])

    builder = Builder(data_dir=data_dir, file_format="array_record")
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(
            try_download_gcs=False, num_shards=num_shards
        )
    )
    directory = Path(builder.data_path)
    if file_format == "tfrecord":
        turn_into_tfrecord(directory)
    return directory


def make_images(seed: int, num_examples: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    images = random.integers(0, 256, (num_examples, 6, 5, 3), dtype=np.uint8)
    # The first pixel numbers the image: TFDS shuffles examples as it prepares them.
    images[:, 0, 0, 0] = np.arange(num_examples)
    return images


def to_examples(images: np.ndarray, labels: np.ndarray) -> Examples:
    return [
        {"image": encode_png(image), "label": int(label), "name": str(label)}
        for image, label in zip(images, labels, strict=True)
    ]


@pytest.fixture(scope="session")
def frame() -> Callable[[Iterable[bytes]], bytes]:
    return frame_tfrecord


@pytest.fixture(scope="session")
def prepare() -> Callable[..., Path]:
    return prepare_set


@pytest.fixture(scope="session")
def change_json() -> Callable[..., None]:
    return edit_json


@pytest.fixture(scope="session")
def png() -> Callable[[np.ndarray], bytes]:
    return encode_png


@pytest.fixture(scope="session")
def tiny_arrays() -> ImageSet:
    train_images, test_images = make_images(0, 40), make_images(1, 12)
    return ImageSet(
        train_images=train_images,
        train_labels=(train_images[:, 0, 0, 0] % 7).astype(np.int32),
        test_images=test_images,
        test_labels=(test_images[:, 0, 0, 0] % 5).astype(np.int32),
        num_classes=7,
    )


@pytest.fixture(scope="session", params=["array_record", "tfrecord"])
def tiny_dir(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_arrays: ImageSet,
) -> Path:
    """A directory holding the set `tiny`, whose arrays are `tiny_arrays`."""
    import tensorflow_datasets as tfds

    data_dir = tmp_path_factory.mktemp(request.param)
    prepare_set(
        data_dir,
        {
            "train": to_examples(tiny_arrays.train_images, tiny_arrays.train_labels),
            "test": to_examples(tiny_arrays.test_images, tiny_arrays.test_labels),
        },
        {
            "image": tfds.features.Image(shape=(6, 5, 3)),
            "label": tfds.features.ClassLabel(num_classes=7),
            "name": tfds.features.Text(),
        },
        file_format=request.param,
        num_shards=2,
    )
    return data_dir
