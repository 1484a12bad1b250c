import sys

import numpy as np
import pytest

from experiments.data.cluttered_digits import ClutteredDigits
from experiments.data.datasets import CLUTTERED_MNIST, NUM_CLASSES, load_splits
from experiments.data.errors import DataError
from experiments.data.splits import Augmentation

AUGMENTATION = Augmentation(image_size=32, min_area=1.0, flip=False, crop_fraction=1.0)


def test_cluttered_digits_need_no_data_directory(tmp_path):
    splits = load_splits("cluttered_mnist", None, AUGMENTATION)
    for split, size in zip(splits, (60_000, 10_000), strict=True):
        assert isinstance(split, ClutteredDigits)
        assert len(split) == size
        assert split.num_classes == NUM_CLASSES[CLUTTERED_MNIST]
        images = split.evaluation_example(0, 1).images
        assert images.shape == (1, 32, 32, 3)


def test_cluttered_digits_are_no_images_of_the_user(tmp_path):
    with pytest.raises(DataError, match=f"--data_dir={tmp_path}: cluttered_mnist is"):
        load_splits("cluttered_mnist", str(tmp_path), AUGMENTATION)


def test_a_checksum_tells_sets_of_one_name_apart(tiny_dir):
    train, test = load_splits("tiny", str(tiny_dir), AUGMENTATION)
    again, _ = load_splits("tiny", str(tiny_dir), AUGMENTATION)
    assert train.checksum == again.checksum != test.checksum
    digits, others = load_splits("cluttered_mnist", None, AUGMENTATION)
    assert digits.checksum != others.checksum


def test_any_other_name_is_a_prepared_set(tiny_dir, tiny_arrays):
    train, test = load_splits("tiny", str(tiny_dir), AUGMENTATION)
    assert (len(train), len(test)) == (40, 12)
    assert train.num_classes == 7
    random = np.random.default_rng(0)
    labels = [train.training_example(index, random).label for index in range(40)]
    assert sorted(labels) == sorted(tiny_arrays.train_labels.tolist())


@pytest.mark.parametrize("name", ["nosuch", "cluttered_mnist:1.0.0"])
def test_unknown_set(tmp_path, name):
    with pytest.raises(DataError, match=name) as caught:
        load_splits(name, str(tmp_path), AUGMENTATION)
    assert "\n" not in str(caught.value)


def test_classes_of_imagenet():
    assert NUM_CLASSES["imagenet2012"] == 1_000


def test_sets_of_files_without_tensorflow_datasets(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(DataError, match=r"pip install -e '\.\[imagenet\]'"):
        load_splits("imagenet2012", str(tmp_path), AUGMENTATION)
