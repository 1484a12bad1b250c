"""Small prepared sets, and their makers, as fixtures."""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest

from experiments.data.image_set import ImageSet
from tests.experiments.data.prepared_sets import (
    Examples,
    edit_json,
    encode_png,
    frame_tfrecord,
    prepare_set,
)


@pytest.fixture(autouse=True)
def cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where indices of TFRECORD files are kept: not in the user's own cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


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
