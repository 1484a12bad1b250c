"""Makers of small prepared sets, in the exact layout that TFDS gives them."""

import io
import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import PIL.Image

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
    version: str = "1.0.0",
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
            VERSION = tfds.core.Version(version)
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
