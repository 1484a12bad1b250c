"""Reads small image classification sets that TFDS has prepared into memory."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from etils import epath

from experiments.data.decoding import image_size
from experiments.data.errors import DataError
from experiments.data.image_set import ImageSet
from experiments.data.metadata import (
    Features,
    choose_features,
    choose_splits,
    parse_example,
    read_info,
)
from experiments.data.records import read_file
from experiments.data.splits import UndecodableError

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

DEFAULT_MEMORY_LIMIT = 4 * 2**30  # bytes


def load_prepared(
    name: str,
    data_dir: str | None = None,
    *,
    memory_limit: int = DEFAULT_MEMORY_LIMIT,
) -> ImageSet:
    """Loads a prepared set: its train split, and its test or else validation split.

    Args:
      name: the TFDS name, as `metadata.read_info` takes it.
      data_dir: the directory that holds prepared sets, or None for TFDS's default.
      memory_limit: the most bytes that the arrays may take.

    Returns:
      The whole set, in host memory: images of one shape, uint8 (examples, height,
      width, channels), and labels, int32 (examples,).

    Raises:
      DataError: if the set is unknown, not prepared, or damaged; if it lacks a split;
        if it isn't made of uint8 images of one shape, each with one class label; if
        its files are of another form; if it takes more memory than the limit.
    """
    info = read_info(name, data_dir)
    features = choose_features(name, info)
    height, width, channels = features.image_shape
    if height is None or width is None:
        raise DataError(
            f"data set {name!r} has images of no fixed shape: {features.image_shape}; "
            "expected one (height, width, channels) for all; prepare a resized copy of "
            "the set"
        )
    shape = (height, width, channels)
    train, test = choose_splits(name, info, features)
    num_examples = train.num_examples + test.num_examples
    num_bytes = num_examples * (math.prod(shape) + np.int32().nbytes)
    if num_bytes > memory_limit:
        raise DataError(
            f"data set {name!r} is too large to be held in memory: its {num_examples} "
            f"examples take {num_bytes} bytes, expected at most {memory_limit}; choose "
            "a smaller set or raise memory_limit"
        )
    return ImageSet(
        *_read_split(info, train, features, shape),
        *_read_split(info, test, features, shape),
        num_classes=features.num_classes,
    )


def _read_split(
    info: tfds.core.DatasetInfo,
    split: tfds.core.SplitInfo,
    features: Features,
    shape: tuple[int, int, int],
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the images and the labels of a split.

    One thread: decoding small images is mostly Python, which threads only slow down.
    """
    import tensorflow_datasets as tfds

    # Decoding these two alone spares whatever else the examples hold.
    decoder = tfds.features.FeaturesDict(
        {key: info.features[key] for key in (features.image_key, features.label_key)}
    )
    images = np.empty((split.num_examples, *shape), np.uint8)
    labels = np.empty(split.num_examples, np.int32)
    position = 0
    for path, length in zip(split.filepaths, split.shard_lengths, strict=True):
        for number, record in enumerate(
            read_file(path, length, info.file_format.value)
        ):
            try:
                # TFDS decodes whatever a header claims, and looks at the shape then.
                image_size(parse_example(record, features).image)
                example = decoder.deserialize_example_np(record)
                image, label = example[features.image_key], example[features.label_key]
            except UndecodableError as error:
                raise _bad_example(path, number, str(error)) from None
            # Protobuf, TFDS and the library that decodes images, whichever TFDS takes,
            # each raise exceptions of their own, some of which say nothing to a user.
            except Exception as error:
                raise _bad_example(path, number, "it cannot be decoded") from error
            if image.shape != shape:
                raise _bad_example(path, number, f"its image's shape is {image.shape}")
            if not 0 <= label < features.num_classes:
                raise _bad_example(path, number, f"its label is {label}")
            images[position], labels[position] = image, label
            position += 1
    return images, labels


def _bad_example(path: epath.Path, number: int, problem: str) -> DataError:
    return DataError(
        f"example {number} (from 0) of record file {path} is unusable: {problem}; "
        "expected an image and a label as its features.json says; prepare the data set "
        "again, or choose another"
    )
