"""Reads image classification sets that TensorFlow Datasets (TFDS) has prepared.

A prepared set is a directory: metadata, and shards of records in ARRAY_RECORD or
TFRECORD form. TFDS serves to find the directory and to decode an example; the files
are read here, so that nothing is ever downloaded and TensorFlow is not needed.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from etils import epath

from experiments.data.errors import DataError
from experiments.data.image_set import ImageSet
from experiments.data.tfrecord import read_records

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

DEFAULT_MEMORY_LIMIT = 4 * 2**30  # bytes


class _Features(NamedTuple):
    """Where an example keeps its image and its label, and what they look like."""

    image_key: str
    label_key: str
    image_shape: tuple[int, int, int]
    num_classes: int


def load_prepared(
    name: str,
    data_dir: str | None = None,
    *,
    memory_limit: int = DEFAULT_MEMORY_LIMIT,
) -> ImageSet:
    """Loads a prepared set: its train split, and its test or else validation split.

    Args:
      name: the TFDS name, with a configuration or version if wanted: `"cifar10"`,
        `"emnist/letters"`, `"my_set:1.0.0"`. Without a version, the latest prepared
        one is taken. The set need not be registered with TFDS.
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
    info = _read_info(name, data_dir)
    features = _choose_features(name, info)
    train, test = _choose_splits(name, info)
    if info.file_format.value not in ("array_record", "tfrecord"):
        raise DataError(
            f"data set {name!r} is prepared in the {info.file_format.value} form: "
            "expected array_record or tfrecord; prepare it again with "
            "file_format='array_record'"
        )
    num_examples = train.num_examples + test.num_examples
    num_bytes = num_examples * (math.prod(features.image_shape) + np.int32().nbytes)
    if num_bytes > memory_limit:
        raise DataError(
            f"data set {name!r} is too large to be held in memory: its {num_examples} "
            f"examples take {num_bytes} bytes, expected at most {memory_limit}; choose "
            "a smaller set or raise memory_limit"
        )
    return ImageSet(
        *_read_split(info, train, features),
        *_read_split(info, test, features),
        num_classes=features.num_classes,
    )


def _read_info(name: str, data_dir: str | None) -> tfds.core.DatasetInfo:
    """Returns the metadata of a prepared set, without running the set's own code."""
    import tensorflow_datasets as tfds

    directory = epath.Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
    if tfds.core.naming.is_valid_dataset_name(name):
        try:
            builder = tfds.core.read_only_builder.builder_from_files(
                name, data_dir=directory
            )
            return builder.info
        except tfds.core.DatasetNotFoundError:
            pass
        # Damaged metadata surfaces as one of many types: of JSON, protobuf and TFDS.
        except Exception as error:
            raise DataError(
                f"the metadata of data set {name!r} in {directory} cannot be read "
                f"({_first_line(error)}): expected dataset_info.json and features.json "
                "as TFDS 4 writes them; prepare the set again"
            ) from error
    base_name = name.split("/")[0].split(":")[0]
    try:
        tfds.core.registered.imported_builder_cls(base_name)
    except tfds.core.DatasetNotFoundError:
        problem = "is unknown to TFDS and has no directory of its own"
        remedy = "correct the name or the directory"
    else:
        problem = "is not prepared"
        remedy = (
            'prepare it with python -c "import tensorflow_datasets as tfds; '
            f"tfds.builder('{name}', data_dir='{directory}', "
            "file_format='array_record').download_and_prepare()\" (which for some "
            "sets needs TensorFlow)"
        )
    raise DataError(
        f"data set {name!r} {problem} in {directory}: expected one of those prepared "
        f"there ({_list_prepared(directory)}); {remedy}"
    )


def _list_prepared(directory: epath.Path) -> str:
    """Returns the names of the sets under a directory of prepared sets."""
    versions = [
        path.parent
        for depth in ("*", "*/*")
        for path in directory.glob(f"{depth}/[0-9]*/dataset_info.json")
    ]
    names = {str(version.parent.relative_to(directory)) for version in versions}
    return ", ".join(sorted(names)) or "none"


def _choose_features(name: str, info: tfds.core.DatasetInfo) -> _Features:
    """Finds the image and the label: the supervised pair if given, else by type."""
    import tensorflow_datasets as tfds

    images = [
        key
        for key, feature in info.features.items()
        if isinstance(feature, tfds.features.Image)
    ]
    labels = [
        key
        for key, feature in info.features.items()
        if isinstance(feature, tfds.features.ClassLabel)
    ]
    if info.supervised_keys is not None:
        images = [key for key in images if key == info.supervised_keys[0]]
        labels = [key for key in labels if key == info.supervised_keys[1]]
    if len(images) != 1 or len(labels) != 1:
        found = ", ".join(
            f"{key} ({type(feature).__name__})"
            for key, feature in sorted(info.features.items())
        )
        raise DataError(
            f"data set {name!r} is no image classification set: it has the features "
            f"{found}, and supervised_keys {info.supervised_keys}; expected one Image "
            "and one ClassLabel feature; choose another set"
        )
    image, label = info.features[images[0]], info.features[labels[0]]
    if None in image.shape:
        raise DataError(
            f"data set {name!r} has images of no fixed shape: {image.shape}; expected "
            "one (height, width, channels) for all; prepare a resized copy of the set"
        )
    if image.np_dtype != np.uint8:
        raise DataError(
            f"data set {name!r} has images of type {np.dtype(image.np_dtype)}: "
            "expected uint8; choose another set"
        )
    return _Features(images[0], labels[0], image.shape, label.num_classes)


def _choose_splits(
    name: str, info: tfds.core.DatasetInfo
) -> tuple[tfds.core.SplitInfo, tfds.core.SplitInfo]:
    """Returns the train split, and the test or else the validation split."""
    sizes = {split: info.splits[split].num_examples for split in info.splits}
    tests = [split for split in ("test", "validation") if sizes.get(split)]
    if not sizes.get("train") or not tests:
        found = ", ".join(f"{split} ({size})" for split, size in sizes.items())
        raise DataError(
            f"data set {name!r} lacks a split: it has {found or 'none'}; expected "
            "examples in train, and in test or validation; choose another set"
        )
    return info.splits["train"], info.splits[tests[0]]


def _read_split(
    info: tfds.core.DatasetInfo, split: tfds.core.SplitInfo, features: _Features
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the images and the labels of a split.

    One thread: decoding small images is mostly Python, which threads only slow down.
    """
    import tensorflow_datasets as tfds

    # Decoding these two alone spares whatever else the examples hold.
    decoder = tfds.features.FeaturesDict(
        {key: info.features[key] for key in (features.image_key, features.label_key)}
    )
    images = np.empty((split.num_examples, *features.image_shape), np.uint8)
    labels = np.empty(split.num_examples, np.int32)
    position = 0
    for path, length in zip(split.filepaths, split.shard_lengths, strict=True):
        records = _read_shard(path, info.file_format.value)
        if len(records) != length:
            raise DataError(
                f"record file {path} holds {len(records)} examples: expected {length}, "
                "as its dataset_info.json says; prepare the data set again"
            )
        for number, record in enumerate(records):
            try:
                example = decoder.deserialize_example_np(record)
                image, label = example[features.image_key], example[features.label_key]
            # Protobuf, TFDS and Pillow each raise exceptions of their own.
            except Exception as error:
                raise _bad_example(path, number, _first_line(error)) from error
            if image.shape != features.image_shape:
                raise _bad_example(path, number, f"its image's shape is {image.shape}")
            if not 0 <= label < features.num_classes:
                raise _bad_example(path, number, f"its label is {label}")
            images[position], labels[position] = image, label
            position += 1
    return images, labels


def _read_shard(path: epath.Path, file_format: str) -> list[bytes]:
    """Returns the records of one file."""
    if not path.exists():
        raise DataError(
            f"record file {path} is missing: expected every file that its "
            "dataset_info.json lists; copy it again, or prepare the data set again"
        )
    if file_format == "tfrecord":
        return list(read_records(path))

    from array_record.python import array_record_module

    try:
        reader = array_record_module.ArrayRecordReader(str(path))
        records: list[bytes] = reader.read_all()
        reader.close()
    except RuntimeError as error:
        raise DataError(
            f"record file {path} is truncated or corrupted ({_first_line(error)}): "
            "expected whole array_record chunks; copy the file again, or prepare its "
            "data set again"
        ) from error
    return records


def _bad_example(path: epath.Path, number: int, problem: str) -> DataError:
    return DataError(
        f"example {number} (from 0) of record file {path} is unusable: {problem}; "
        "expected an image and a label as its features.json says; prepare the data set "
        "again, or choose another"
    )


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
