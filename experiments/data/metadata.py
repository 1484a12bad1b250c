"""What TFDS's metadata say of a prepared image classification set.

A prepared set is a directory: metadata, and shards of records in ARRAY_RECORD or
TFRECORD form. TFDS serves to find the directory and to read the metadata; nothing is
ever downloaded, and TensorFlow is not needed.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from etils import epath

from experiments.data.errors import DataError, first_line, printable
from experiments.data.files import file_status
from experiments.data.records import FILE_FORMATS, Records
from experiments.data.splits import UndecodableError

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

_FILE_NAME_KEY = "file_name"
_DEFAULTS_FOLDER = ".config"  # beside the versions: which configuration is meant
_RECORDS_LOOKED_AT = 10  # to tell whether a split has labels

# What metadata may claim: more than any set has, and little enough to go on with.
_MAX_METADATA_BYTES = 2**24
_MAX_SHARDS = 10**5  # file names have five digits for them
_MAX_NAME = 255  # letters of a file's name
_MAX_CLASSES = 10**6
_MAX_SIDE = 2**16  # of images of a fixed shape, in pixels
_CHANNELS = (1, 3, 4)

# Where features.json has names of Python classes, whose modules TFDS imports: in
# spellings of the protocol buffer, and as earlier versions of TFDS had it.
_CLASS_KEYS = ("pythonClassName", "python_class_name", "type")
_CLASSES_OF_TFDS = "tensorflow_datasets.core.features."


class Features(NamedTuple):
    """Where an example keeps its image and its label, and what they look like."""

    image_key: str
    label_key: str
    image_shape: tuple[int | None, int | None, int]  # None: not the same for all
    num_classes: int


class EncodedExample(NamedTuple):
    """An example as it is stored."""

    image: bytes  # JPEG or PNG
    label: int  # -1 where it is kept secret
    file_name: str  # empty if the set has none


def read_info(name: str, data_dir: str | None) -> tfds.core.DatasetInfo:
    """Reads the metadata of a prepared set, without running the set's own code.

    Args:
      name: the TFDS name, with a configuration or version if wanted: `"cifar10"`,
        `"emnist/letters"`, `"my_set:1.0.0"`. Without a version, the latest prepared
        one is taken. The set need not be registered with TFDS.
      data_dir: the directory that holds prepared sets, or None for TFDS's default.

    Raises:
      DataError: if the set is unknown, not prepared, damaged, or in a form other than
        array_record and TFRECORD; or if tensorflow-datasets is not installed.
    """
    try:
        import tensorflow_datasets as tfds
    except ModuleNotFoundError as error:
        raise DataError(
            f"data set {name!r} is read with tensorflow-datasets, and {error.name} is "
            "not installed: pip install -e '.[imagenet]'"
        ) from None

    directory = data_directory(data_dir)
    if not tfds.core.naming.is_valid_dataset_name(name):
        raise _not_prepared(name, directory)
    try:
        _check_before_parsing(directory / _directory_name(name))
        # TFDS prints a banner over several lines where it would need TensorFlow.
        with contextlib.redirect_stdout(io.StringIO()):
            info = tfds.core.read_only_builder.builder_from_files(
                name, data_dir=directory
            ).info
        _check_claims(info)
    except tfds.core.DatasetNotFoundError:
        raise _not_prepared(name, directory) from None
    # Damaged metadata surfaces as one of many types: of JSON, protobuf and TFDS.
    except Exception as error:
        raise DataError(
            f"the metadata of data set {name!r} in {directory} cannot be read "
            f"({first_line(error)}): expected dataset_info.json and features.json "
            "as TFDS 4 writes them; prepare the set again"
        ) from error
    if info.file_format.value not in FILE_FORMATS:
        raise DataError(
            f"data set {name!r} is prepared in the {info.file_format.value} form: "
            f"expected {' or '.join(FILE_FORMATS)}; prepare it again with "
            "file_format='array_record'"
        )
    return info


def _directory_name(name: str) -> str:
    """The folder of a set's configurations and versions, as TFDS takes its name."""
    import tensorflow_datasets as tfds

    parsed, _ = tfds.core.naming.parse_builder_name_kwargs(name)
    return str(parsed.name)


def _check_before_parsing(directory: epath.Path) -> None:
    """Looks at the metadata of all versions for what TFDS should not even read.

    Raises:
      ValueError: something else than a file would be waited for, more would be read
        than metadata take, or the code of others would be run.
    """
    versions = [
        path.parent
        for depth in ("*", "*/*")
        for path in directory.glob(f"{depth}/features.json")
    ]
    for folder in (*versions, directory / _DEFAULTS_FOLDER):
        for path in folder.glob("*"):
            if path.suffix not in (".json", ".txt"):
                continue
            if (size := file_status(path).size) > _MAX_METADATA_BYTES:
                raise ValueError(f"{path} has {size:,} bytes")
    for version in versions:
        path = version / "features.json"
        for class_name in _class_names(json.loads(path.read_text())):
            if not str(class_name).startswith(_CLASSES_OF_TFDS):
                raise ValueError(f"{path} names {class_name!r}, no feature of TFDS")


def _class_names(content: Any) -> list[Any]:
    """All names of classes in a JSON value, and in JSON that it holds as text."""
    if isinstance(content, list):
        return [name for entry in content for name in _class_names(entry)]
    if not isinstance(content, dict):
        return []
    names = []
    for key, value in content.items():
        if key == "json" and isinstance(value, str):
            names += _class_names(json.loads(value))
        elif key in _CLASS_KEYS and not isinstance(value, dict | list):
            names.append(value)
        else:
            names += _class_names(value)
    return names


def _check_claims(info: tfds.core.DatasetInfo) -> None:
    """Raises ValueError where metadata claim what no set has."""
    for name, split in info.splits.items():
        lengths = split.shard_lengths
        if len(lengths) > _MAX_SHARDS or min(lengths, default=0) < 0:
            raise ValueError(
                f"split {name} is said to have {len(lengths)} files, the smallest of "
                f"{min(lengths)} examples"
            )
        for path in split.filepaths:
            directory, _, file_name = os.fspath(path).rpartition("/")
            if directory != os.fspath(info.data_dir).rstrip("/"):
                raise ValueError(f"split {name} is said to lie elsewhere, in {path}")
            if len(file_name) > _MAX_NAME or not file_name.isprintable():
                raise ValueError(f"split {name} is said to lie in {file_name!a}")


def data_directory(data_dir: str | None) -> epath.Path:
    """Returns the directory of prepared sets, where None is TFDS's default."""
    import tensorflow_datasets as tfds

    return epath.Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()


def choose_features(name: str, info: tfds.core.DatasetInfo) -> Features:
    """Finds the image and the label: the supervised pair if given, else by type.

    Raises:
      DataError: if the examples aren't made of a uint8 image and a class label.
    """
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
    if image.np_dtype != np.uint8:
        raise DataError(
            f"data set {name!r} has images of type {np.dtype(image.np_dtype)}: "
            "expected uint8; choose another set"
        )
    if not (
        len(image.shape) == 3
        and all(side is None or 0 < side <= _MAX_SIDE for side in image.shape[:2])
        and image.shape[2] in _CHANNELS
        and 0 < (label.num_classes or 0) <= _MAX_CLASSES
    ):
        raise DataError(
            f"data set {name!r} has images of the shape {image.shape} and "
            f"{label.num_classes} classes: expected at most {_MAX_SIDE:,} pixels a "
            f"side, {' or '.join(map(str, _CHANNELS))} channels, and at most "
            f"{_MAX_CLASSES:,} classes; choose another set"
        )
    return Features(
        image_key=images[0],
        label_key=labels[0],
        image_shape=image.shape,
        num_classes=label.num_classes,
    )


def choose_splits(
    name: str, info: tfds.core.DatasetInfo, features: Features
) -> tuple[tfds.core.SplitInfo, tfds.core.SplitInfo]:
    """Returns the train split, and the test or else the validation split.

    ImageNet and other challenges keep the labels of their test split secret; then it's
    the validation split too.

    Raises:
      DataError: if the set lacks such a split.
    """
    sizes = {split: info.splits[split].num_examples for split in info.splits}
    tests = [split for split in ("test", "validation") if sizes.get(split)]
    if not sizes.get("train") or not tests:
        found = ", ".join(f"{split} ({size})" for split, size in sizes.items())
        raise DataError(
            f"data set {name!r} lacks a split: it has {found or 'none'}; expected "
            "examples in train, and in test or validation; choose another set"
        )
    if len(tests) > 1 and not _has_labels(info, info.splits["test"], features):
        tests.remove("test")
    return info.splits["train"], info.splits[tests[0]]


def parse_example(record: bytes, features: Features) -> EncodedExample:
    """Takes an example apart, many times faster than TFDS's own parser does it.

    Raises:
      UndecodableError: if it has no image or no label.
    """
    from tensorflow_datasets.proto import tf_example_pb2

    try:
        fields = tf_example_pb2.Example.FromString(record).features.feature
        (image,) = fields[features.image_key].bytes_list.value
        (label,) = fields[features.label_key].int64_list.value
    # Protobuf raises exceptions of its own.
    except Exception:
        raise UndecodableError(
            f"it has no {features.image_key} or no {features.label_key}"
        ) from None
    file_name = b"".join(fields[_FILE_NAME_KEY].bytes_list.value)
    return EncodedExample(image, label, printable(file_name.decode(errors="replace")))


def _has_labels(
    info: tfds.core.DatasetInfo, split: tfds.core.SplitInfo, features: Features
) -> bool:
    """Whether any of the first examples has a label that is not secret."""
    records = Records(
        split.filepaths[:1], split.shard_lengths[:1], info.file_format.value
    )
    for index in range(min(len(records), _RECORDS_LOOKED_AT)):
        with contextlib.suppress(UndecodableError):
            if parse_example(records[index], features).label >= 0:
                return True
    return False


def _not_prepared(name: str, directory: epath.Path) -> DataError:
    import tensorflow_datasets as tfds

    base_name = name.split("/")[0].split(":")[0]
    try:
        tfds.core.registered.imported_builder_cls(base_name)
    except tfds.core.DatasetNotFoundError:
        problem = "is unknown to TFDS and has no directory of its own"
        remedy = "correct the name or the directory"
    else:
        problem = "is not prepared"
        remedy = (
            f"prepare it with python -m experiments.prepare {name} "
            f"--data_dir='{directory}' or, where TensorFlow is installed, with "
            f"tfds.builder('{name}', data_dir='{directory}', "
            "file_format='array_record').download_and_prepare()"
        )
    return DataError(
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
