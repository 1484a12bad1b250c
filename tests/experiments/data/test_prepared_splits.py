from typing import ClassVar

import numpy as np
import pytest
from etils.epath import backend

from experiments.data.crops import evaluation_crops, training_crop
from experiments.data.decoding import decode
from experiments.data.errors import DataError
from experiments.data.metadata import Features, parse_example
from experiments.data.prepared_splits import load_prepared_splits
from experiments.data.splits import Augmentation, UndecodableError
from tests.experiments.data.imagenet_shaped import (
    BROKEN,
    make_imagenet,
    train_images,
    validation_images,
)
from tests.experiments.data.prepared_sets import encode_png, prepare_set

NUM_TRAIN, NUM_VALIDATION = 24, 10
WHOLE = Augmentation(image_size=24, min_area=1, flip=False, crop_fraction=0.875)
RANDOM = Augmentation(image_size=24, min_area=0.08, flip=True, crop_fraction=0.875)


@pytest.fixture(scope="module", params=["array_record", "tfrecord"])
def file_format(request):
    return request.param


@pytest.fixture(scope="module")
def imagenet_dir(tmp_path_factory, file_format):
    data_dir = tmp_path_factory.mktemp(f"imagenet_{file_format}")
    sizes = {"num_train": NUM_TRAIN, "num_validation": NUM_VALIDATION, "num_test": 3}
    make_imagenet(data_dir, file_format=file_format, **sizes)
    return data_dir


@pytest.fixture
def imagenet(imagenet_dir):
    return load_prepared_splits("imagenet2012", str(imagenet_dir), RANDOM)


@pytest.fixture
def tfds_features():
    import tensorflow_datasets as tfds

    return tfds.features


def read_or_name(read, *arguments):
    """What is read, or the message if it can't be."""
    try:
        return read(*arguments)
    except UndecodableError as error:
        return str(error)


def stored_examples(data_dir, split):
    """The examples in TFDS's order, as TFDS itself reads them."""
    import tensorflow_datasets as tfds

    return list(
        tfds.data_source(
            "imagenet2012",
            split=split,
            data_dir=data_dir,
            download=False,
            decoders={"image": tfds.decode.SkipDecoding()},
        )
    )


def test_splits_of_imagenet(imagenet):
    train, validation = imagenet
    assert (len(train), len(validation)) == (NUM_TRAIN, NUM_VALIDATION)
    assert train.num_classes == validation.num_classes == 1000
    assert list(train.shard_lengths) == [12, 12]
    assert list(validation.shard_lengths) == [5, 5]


def test_all_files_but_the_broken_one_give_images(imagenet):
    for split, made in zip(
        imagenet,
        (train_images(NUM_TRAIN, True, 0), validation_images(NUM_VALIDATION, True, 0)),
        strict=True,
    ):
        labels, messages = [], []
        for index in range(len(split)):
            found = read_or_name(
                split.training_example, index, np.random.default_rng(index)
            )
            if isinstance(found, str):
                messages.append(found)
                assert read_or_name(split.evaluation_example, index, 1) == found
                continue
            labels.append(found.label)
            assert found.images.shape == (24, 24, 3)
            assert found.images.dtype == np.uint8
            crops = split.evaluation_example(index, 10)
            assert crops.images.shape == (10, 24, 24, 3)
            assert crops.label == found.label
        (message,) = messages
        assert f"({made[BROKEN].file_name})" in message
        assert "(from 0) of record file " in message
        assert "\n" not in message
        assert not message.endswith(".")
        assert len(labels) == len(made) - 1


def test_labels_and_images_belong_together(tmp_path):
    """The order of the examples is TFDS's, whose reader is the other witness."""
    make_imagenet(tmp_path, num_train=NUM_TRAIN, num_validation=4, broken=False)
    train, validation = load_prepared_splits("imagenet2012", str(tmp_path), RANDOM)
    for split, name in ((train, "train"), (validation, "validation")):
        for index, stored in enumerate(stored_examples(tmp_path, name)):
            found = split.training_example(index, np.random.default_rng(5))
            expected = training_crop(stored["image"], RANDOM, np.random.default_rng(5))
            np.testing.assert_array_equal(found.images, expected)
            assert found.label == stored["label"]
            found = split.evaluation_example(index, 144)
            expected = evaluation_crops(decode(stored["image"]), RANDOM, 144)
            np.testing.assert_array_equal(found.images, expected)
            assert found.label == stored["label"]


def test_both_forms_hold_the_same(tmp_path):
    splits = []
    for form in ("array_record", "tfrecord"):
        make_imagenet(tmp_path / form, file_format=form, num_train=9, num_validation=3)
        splits += load_prepared_splits("imagenet2012", str(tmp_path / form), RANDOM)
    for one, other in ((splits[0], splits[2]), (splits[1], splits[3])):
        for index in range(len(one)):
            first, second = (
                read_or_name(split.training_example, index, np.random.default_rng(1))
                for split in (one, other)
            )
            if isinstance(first, str):
                assert first.split("): ")[-1] == second.split("): ")[-1]
                continue
            np.testing.assert_array_equal(first.images, second.images)
            assert first.label == second.label


def test_class_shows_in_the_images(tmp_path):
    """What the helper promises to those who train on its set."""
    make_imagenet(tmp_path, num_train=80, num_validation=40, broken=False)
    train, validation = load_prepared_splits("imagenet2012", str(tmp_path), WHOLE)

    def mean_colours(split):
        examples = [split.evaluation_example(index, 1) for index in range(len(split))]
        colours = [example.images.mean((0, 1, 2)) for example in examples]
        return np.array(colours), np.array([example.label for example in examples])

    (colours, labels), (others, other_labels) = map(mean_colours, (train, validation))
    distances = ((others[:, np.newaxis] - colours) ** 2).sum(-1)
    accuracy = (labels[distances.argmin(1)] == other_labels).mean()
    assert len(set(other_labels)) == 8
    assert accuracy > 0.7


def test_grey_images_are_grey_and_png_is_read(imagenet_dir):
    train, _ = load_prepared_splits("imagenet2012", str(imagenet_dir), WHOLE)
    examples = [
        read_or_name(train.training_example, index, np.random.default_rng(0))
        for index in range(len(train))
    ]
    grey = [
        np.ptp(example.images, axis=-1).max() == 0
        for example in examples
        if not isinstance(example, str)
    ]
    made = train_images(NUM_TRAIN, True, 0)
    assert sum(grey) == sum(number % 10 in (2, 5) for number in range(len(made)))


@pytest.mark.parametrize("secret", [True, False])
def test_test_split_with_secret_labels(tmp_path, tfds_features, file_format, secret):
    example = {"image": encode_png(np.zeros((4, 4, 3), np.uint8)), "label": 0}
    test = [example | ({"label": -1} if secret else {})] * 5
    features = {
        "image": tfds_features.Image(),
        "label": tfds_features.ClassLabel(num_classes=7),
    }
    splits = {"train": [example], "validation": [example] * 2, "test": test}
    prepare_set(tmp_path, splits, features, file_format=file_format)
    _, found = load_prepared_splits("tiny", str(tmp_path), WHOLE)
    assert len(found) == (2 if secret else 5)


def test_one_unusable_test_label_is_no_secret(tmp_path, tfds_features):
    example = {"image": encode_png(np.zeros((4, 4, 3), np.uint8)), "label": 3}
    features = {
        "image": tfds_features.Image(),
        "label": tfds_features.ClassLabel(num_classes=7),
    }
    test = [example | {"label": -1}] * 2 + [example] * 2
    splits = {"train": [example], "validation": [example], "test": test}
    prepare_set(tmp_path, splits, features)
    _, found = load_prepared_splits("tiny", str(tmp_path), WHOLE)
    assert len(found) == 4
    messages = [read_or_name(found.evaluation_example, index, 1) for index in range(4)]
    named = [message for message in messages if isinstance(message, str)]
    assert len(named) == 2
    assert all("its label is -1, expected 0 to 6" in message for message in named)


@pytest.mark.parametrize("shape", [(5, 6, 1), (5, 6, 3), (5, 6, 4)])
def test_sets_of_other_images(tmp_path, tfds_features, shape):
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    image[..., 3:] = 255
    features = {
        "picture": tfds_features.Image(shape=shape),
        "kind": tfds_features.ClassLabel(names=["cat", "dog"]),
        "file_name": tfds_features.ClassLabel(num_classes=2),
    }
    example = {"picture": encode_png(image), "kind": "dog", "file_name": 0}
    splits = {"train": [example], "test": [example]}
    prepare_set(
        tmp_path, splits, features, config="small", supervised_keys=("picture", "kind")
    )
    train, _ = load_prepared_splits(
        "tiny/small", str(tmp_path), WHOLE._replace(image_size=6)
    )
    assert train.num_classes == 2
    example = train.training_example(0, np.random.default_rng(0))
    assert example.label == 1
    assert example.images.shape == (6, 6, 3)


def test_missing_file_is_noticed_at_once(tmp_path, file_format):
    make_imagenet(tmp_path, file_format=file_format, num_train=4, num_validation=2)
    path = next(tmp_path.rglob("*-validation.*-00001-of-*"))
    path.unlink()
    with pytest.raises(DataError, match=f"record file {path} is missing"):
        load_prepared_splits("imagenet2012", str(tmp_path), WHOLE)


def test_damaged_record_is_named(tmp_path, file_format):
    make_imagenet(tmp_path, file_format=file_format, num_train=4, num_validation=2)
    path = next(tmp_path.rglob("*-train.*-00000-of-*"))
    content = bytearray(path.read_bytes())
    content[content.index(b"file_name") + 30] ^= 1
    path.write_bytes(content)
    train, _ = load_prepared_splits("imagenet2012", str(tmp_path), WHOLE)
    found = [read_or_name(train.evaluation_example, index, 1) for index in range(4)]
    messages = [message for message in found if isinstance(message, str)]
    assert any(f"of record file {path}: " in message for message in messages)


def test_not_prepared(tmp_path):
    with pytest.raises(DataError, match=r"experiments\.prepare imagenet2012") as caught:
        load_prepared_splits("imagenet2012", str(tmp_path), WHOLE)
    assert f"--data_dir='{tmp_path}'" in str(caught.value)


def test_no_image_classification_set(tmp_path, tfds_features):
    features = {"label": tfds_features.ClassLabel(num_classes=2)}
    splits = {"train": [{"label": 0}], "test": [{"label": 0}]}
    prepare_set(tmp_path, splits, features, supervised_keys=None)
    with pytest.raises(DataError, match="no image classification set"):
        load_prepared_splits("tiny", str(tmp_path), WHOLE)


@pytest.mark.parametrize("record", [b"", b"\xff\xff", b"nonsense"])
def test_record_that_is_no_example(record):
    features = Features("image", "label", (None, None, 3), 10)
    with pytest.raises(UndecodableError, match="it has no image or no label"):
        parse_example(record, features)


def make_bucket(directory):
    """A file system in memory, with the files below a directory in a bucket."""
    from fsspec.implementations.memory import MemoryFileSystem

    class Bucket(MemoryFileSystem):
        protocol = "s3"
        store: ClassVar = {}
        pseudo_dirs: ClassVar = [""]
        cachable = False

        @classmethod
        def _strip_protocol(cls, path):
            return "/" + path.removeprefix("s3://").strip("/")

    bucket = Bucket()
    bucket.put(str(directory), "s3://bucket/sets", recursive=True)
    return bucket


def test_bucket(imagenet_dir, imagenet, file_format, monkeypatch):
    bucket = make_bucket(imagenet_dir)
    monkeypatch.setattr(backend.fsspec_backend, "_get_filesystem", lambda _: bucket)
    if file_format == "array_record":
        with pytest.raises(DataError, match="mount the bucket") as caught:
            load_prepared_splits("imagenet2012", "s3://bucket/sets", RANDOM)
        assert "s3://bucket/sets/imagenet2012/5.1.0/" in str(caught.value)
        return
    for found, local in zip(
        load_prepared_splits("imagenet2012", "s3://bucket/sets", RANDOM),
        imagenet,
        strict=True,
    ):
        assert len(found) == len(local)
        for index in range(len(local)):
            one, other = (
                read_or_name(split.evaluation_example, index, 1)
                for split in (found, local)
            )
            if isinstance(one, str):
                assert "s3://bucket/sets/imagenet2012/5.1.0/" in one
                continue
            np.testing.assert_array_equal(one.images, other.images)
            assert one.label == other.label
