import re
import shutil

import numpy as np
import pytest

from experiments.data.errors import DataError
from experiments.data.prepared import load_prepared


@pytest.fixture(scope="session")
def tfds_features():
    import tensorflow_datasets as tfds

    return tfds.features


@pytest.fixture
def features(tfds_features):
    return {
        "image": tfds_features.Image(shape=(6, 5, 3)),
        "label": tfds_features.ClassLabel(num_classes=7),
    }


@pytest.fixture
def example(png):
    return {"image": png(np.zeros((6, 5, 3), np.uint8)), "label": 3}


@pytest.fixture
def copied_dir(tiny_dir, tmp_path):
    """A copy of `tiny_dir`, for a test to damage."""
    return shutil.copytree(tiny_dir, tmp_path / "copy")


@pytest.fixture
def version_dir(copied_dir):
    return copied_dir / "tiny" / "1.0.0"


@pytest.fixture
def train_file(version_dir):
    return next(version_dir.glob("tiny-train.*-00001-of-00002"))


def error_of(name, data_dir, **options):
    with pytest.raises(DataError) as caught:
        load_prepared(name, str(data_dir), **options)
    message = str(caught.value)
    assert "\n" not in message
    assert re.search("; (choose|copy|correct|prepare) ", message)
    return message


def sort_by_number(images, labels):
    order = np.argsort(images[:, 0, 0, 0])
    return images[order], labels[order]


def test_both_forms_give_what_was_put_in(tiny_dir, tiny_arrays):
    found = load_prepared("tiny", str(tiny_dir))
    assert found.num_classes == 7
    assert found.train_images.dtype == found.test_images.dtype == np.uint8
    assert found.train_labels.dtype == found.test_labels.dtype == np.int32
    for split in slice(0, 2), slice(2, 4):
        images, labels = sort_by_number(*found[split])
        expected_images, expected_labels = tiny_arrays[split]
        np.testing.assert_array_equal(images, expected_images)
        np.testing.assert_array_equal(labels, expected_labels)


def test_order_is_that_of_tfds(tmp_path, prepare, features, png):
    import tensorflow_datasets as tfds

    examples = [
        {"image": png(np.full((6, 5, 3), i, np.uint8)), "label": i % 7}
        for i in range(30)
    ]
    prepare(tmp_path, {"train": examples, "test": examples}, features, num_shards=3)
    source = tfds.data_source("tiny", split="train", data_dir=tmp_path, download=False)
    found = load_prepared("tiny", str(tmp_path))
    assert found.train_labels.tolist() == [example["label"] for example in source]
    np.testing.assert_array_equal(
        found.train_images, [example["image"] for example in source]
    )


@pytest.mark.parametrize("shape", [(6, 5, 1), (4, 4, 4)])
def test_grey_and_transparent_images(tmp_path, prepare, tfds_features, png, shape):
    image = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    features = {
        "picture": tfds_features.Image(shape=shape),
        "kind": tfds_features.ClassLabel(names=["cat", "dog"]),
    }
    examples = [{"picture": png(image), "kind": "dog"}]
    prepare(
        tmp_path,
        {"train": examples, "test": examples},
        features,
        supervised_keys=None,
    )
    found = load_prepared("tiny", str(tmp_path))
    np.testing.assert_array_equal(found.train_images, image[np.newaxis])
    assert found.train_labels.tolist() == [1]
    assert found.num_classes == 2


def test_supervised_keys_decide_among_several(tmp_path, prepare, tfds_features, png):
    features = {
        "image": tfds_features.Image(shape=(2, 2, 1)),
        "mask": tfds_features.Image(shape=(2, 2, 1)),
        "fine": tfds_features.ClassLabel(num_classes=100),
        "coarse": tfds_features.ClassLabel(num_classes=20),
    }
    black, white = np.zeros((2, 2, 1), np.uint8), np.full((2, 2, 1), 255, np.uint8)
    examples = [{"image": png(white), "mask": png(black), "fine": 70, "coarse": 7}]
    prepare(
        tmp_path,
        {"train": examples, "test": examples},
        features,
        supervised_keys=("image", "coarse"),
    )
    found = load_prepared("tiny", str(tmp_path))
    assert found.train_images.min() == 255
    assert found.train_labels.tolist() == [7]
    assert found.num_classes == 20


def test_registered_name_is_read_from_its_files(tmp_path, prepare, features, example):
    splits = {"train": [example] * 3, "test": [example]}
    prepare(tmp_path, splits, features, name="fashion_mnist")
    assert load_prepared("fashion_mnist", str(tmp_path)).train_images.shape[0] == 3


def test_configuration_and_version_in_the_name(tmp_path, prepare, features, example):
    splits = {"train": [example] * 2, "test": [example]}
    prepare(tmp_path, splits, features, config="small")
    for name in "tiny", "tiny/small", "tiny/small:1.0.0":
        assert load_prepared(name, str(tmp_path)).train_labels.tolist() == [3, 3]
    message = error_of("tiny/large", tmp_path)
    assert "'tiny/large' is unknown" in message
    assert "(tiny/small)" in message


def test_validation_stands_in_for_test_only(tmp_path, prepare, features, example):
    splits = {"train": [example], "validation": [example] * 2}
    prepare(tmp_path / "two", splits, features)
    assert len(load_prepared("tiny", str(tmp_path / "two")).test_labels) == 2
    prepare(tmp_path / "three", splits | {"test": [example] * 3}, features)
    assert len(load_prepared("tiny", str(tmp_path / "three")).test_labels) == 3


def test_default_directory_is_that_of_tfds(tiny_dir, monkeypatch):
    import tensorflow_datasets as tfds

    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tiny_dir))
    assert load_prepared("tiny").num_classes == 7


@pytest.mark.parametrize("name", ["no_such_set", "huggingface:mnist", "../tiny", ""])
def test_unknown_name(tiny_dir, name):
    message = error_of(name, tiny_dir)
    assert f"{name!r} is unknown" in message
    assert f"in {tiny_dir}" in message
    assert "prepared there (tiny)" in message


@pytest.mark.parametrize("name", ["cifar10", "emnist/letters", "mnist:3.0.1"])
def test_known_but_not_prepared(tmp_path, name):
    message = error_of(name, tmp_path / "nowhere")
    assert f"{name!r} is not prepared in {tmp_path / 'nowhere'}" in message
    assert "prepared there (none)" in message
    assert f"tfds.builder('{name}', data_dir='{tmp_path / 'nowhere'}'" in message
    assert "download_and_prepare" in message


@pytest.mark.parametrize("file", ["dataset_info.json", "features.json"])
def test_damaged_metadata(copied_dir, version_dir, file):
    content = (version_dir / file).read_text()
    (version_dir / file).write_text(content[: len(content) // 2])
    message = error_of("tiny", copied_dir)
    assert f"metadata of data set 'tiny' in {copied_dir} cannot be read" in message


def test_no_image(tmp_path, prepare, tfds_features):
    features = {
        "length": tfds_features.Scalar(dtype=np.int64),
        "label": tfds_features.ClassLabel(num_classes=2),
    }
    examples = [{"length": 1, "label": 0}]
    splits = {"train": examples, "test": examples}
    prepare(tmp_path, splits, features, supervised_keys=None)
    message = error_of("tiny", tmp_path)
    assert "'tiny' is no image classification set" in message
    assert "length (Scalar)" in message
    assert "label (ClassLabel)" in message


def test_no_single_label(tmp_path, prepare, tfds_features, features, example):
    features["other"] = tfds_features.ClassLabel(num_classes=2)
    splits = {"train": [example | {"other": 1}], "test": [example | {"other": 1}]}
    prepare(tmp_path, splits, features, supervised_keys=None)
    message = error_of("tiny", tmp_path)
    assert "image (Image), label (ClassLabel), other (ClassLabel)" in message
    assert "supervised_keys None" in message


def test_supervised_pair_is_no_classification(
    tmp_path, prepare, features, example, tfds_features
):
    features["attributes"] = {"bald": tfds_features.Scalar(dtype=np.bool_)}
    examples = [example | {"attributes": {"bald": True}}]
    splits = {"train": examples, "test": examples}
    prepare(tmp_path, splits, features, supervised_keys=("image", "attributes"))
    message = error_of("tiny", tmp_path)
    assert "attributes (FeaturesDict)" in message
    assert "supervised_keys ('image', 'attributes')" in message


def test_images_of_no_fixed_shape(tmp_path, prepare, features, example, tfds_features):
    features["image"] = tfds_features.Image(shape=(None, None, 3))
    prepare(tmp_path, {"train": [example], "test": [example]}, features)
    assert "no fixed shape: (None, None, 3)" in error_of("tiny", tmp_path)


def test_images_of_another_type(tmp_path, prepare, features, example, tfds_features):
    features["image"] = tfds_features.Image(shape=(6, 5, 3), dtype=np.uint16)
    prepare(tmp_path, {"train": [example], "test": [example]}, features)
    assert "type uint16: expected uint8" in error_of("tiny", tmp_path)


@pytest.mark.parametrize(
    ("splits", "found"),
    [
        (("train",), "train (1)"),
        (("test", "validation"), "test (1), validation (1)"),
        (("train", "unlabelled"), "train (1), unlabelled (1)"),
    ],
)
def test_missing_split(tmp_path, prepare, features, example, splits, found):
    prepare(tmp_path, {split: [example] for split in splits}, features)
    message = error_of("tiny", tmp_path)
    assert f"lacks a split: it has {found};" in message
    assert "train, and in test or validation" in message


def test_other_file_format(copied_dir, version_dir, change_json):
    change_json(version_dir / "dataset_info.json", fileFormat="riegeli")
    message = error_of("tiny", copied_dir)
    assert "'tiny' is prepared in the riegeli form" in message
    assert "expected array_record or tfrecord" in message


def test_memory_limit_is_checked_before_reading(copied_dir, version_dir):
    for path in version_dir.glob("tiny-*"):
        path.unlink()
    num_bytes = (40 + 12) * (6 * 5 * 3 + 4)
    message = error_of("tiny", copied_dir, memory_limit=num_bytes - 1)
    assert f"52 examples take {num_bytes} bytes" in message
    assert f"at most {num_bytes - 1}" in message
    assert "is missing" in error_of("tiny", copied_dir, memory_limit=num_bytes)


def test_missing_record_file(copied_dir, train_file):
    train_file.unlink()
    assert f"record file {train_file} is missing" in error_of("tiny", copied_dir)


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_truncated_record_file(copied_dir, train_file, fraction):
    content = train_file.read_bytes()
    train_file.write_bytes(content[: int(fraction * len(content)) + 1])
    message = error_of("tiny", copied_dir)
    assert f"file {train_file} is truncated or corrupted" in message


def test_empty_record_file(copied_dir, train_file):
    train_file.write_bytes(b"")
    assert str(train_file) in error_of("tiny", copied_dir)


def test_flipped_bit_in_a_record_file_never_passes(copied_dir, train_file, tiny_arrays):
    content = train_file.read_bytes()
    random = np.random.default_rng(0)
    messages = []
    for position in random.integers(0, len(content), 60):
        damaged = bytearray(content)
        damaged[position] ^= 1 << random.integers(8)
        train_file.write_bytes(damaged)
        try:
            found = load_prepared("tiny", str(copied_dir))
        except DataError as error:
            messages.append(str(error))
        else:
            images, _ = sort_by_number(*found[:2])
            np.testing.assert_array_equal(images, tiny_arrays.train_images)
    assert all(f"{train_file} is truncated or corrupted" in m for m in messages)
    # Much of a small array_record file is padding, which holds nothing to damage.
    assert len(messages) == 60 or (messages and "array_record" in train_file.name)


def test_another_number_of_examples_than_declared(copied_dir, version_dir, train_file):
    other = train_file.with_name(train_file.name.replace("-train.", "-test."))
    shutil.copy(other, train_file)
    message = error_of("tiny", copied_dir)
    assert f"{train_file} holds 6 examples: expected 20" in message


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"image": b"no picture"}, "neither a JPEG nor a PNG"),
        ({"image": (6, 4, 3)}, r"shape is \(6, 4, 3\)"),
        ({"image": (6, 5, 4)}, r"shape is \(6, 5, 4\)"),
        ({"label": -1}, "its label is -1"),
    ],
)
def test_unusable_example(tmp_path, prepare, features, example, png, change, problem):
    if isinstance(change.get("image"), tuple):
        change = {"image": png(np.zeros(change["image"], np.uint8))}
    splits = {"train": [example], "test": [example | change]}
    directory = prepare(tmp_path, splits, features)
    path = directory / "tiny-test.array_record-00000-of-00001"
    message = error_of("tiny", tmp_path)
    assert f"example 0 (from 0) of record file {path} is unusable" in message
    assert re.search(problem, message)
