import numpy as np
import pytest

from experiments.data.bundled_mnist import load_bundled_mnist
from experiments.data.errors import DataError
from experiments.data.image_set import load_image_set, to_inputs


def test_mnist_without_a_directory_is_the_bundled_one():
    found, expected = load_image_set("mnist"), load_bundled_mnist()
    for found_array, expected_array in zip(found, expected, strict=True):
        np.testing.assert_array_equal(found_array, expected_array)


def test_mnist_with_a_directory_is_a_prepared_one(tmp_path):
    with pytest.raises(DataError, match=f"'mnist' is not prepared in {tmp_path}"):
        load_image_set("mnist", str(tmp_path))


def test_other_names_are_prepared_sets(tiny_dir, tiny_arrays):
    found = load_image_set("tiny", str(tiny_dir))
    assert found.num_classes == tiny_arrays.num_classes
    assert found.train_images.shape == tiny_arrays.train_images.shape


def test_to_inputs_flattens():
    images = np.arange(2 * 3 * 4 * 5, dtype=np.uint8).reshape(2, 3, 4, 5)
    inputs = to_inputs(images, binarise=False)
    assert inputs.dtype == np.uint8
    np.testing.assert_array_equal(inputs, images.reshape(2, 60))
    assert to_inputs(images[:0], binarise=False).shape == (0, 60)


def test_to_inputs_binarises_above_127():
    images = np.array([0, 1, 127, 128, 129, 255], np.uint8).reshape(1, 2, 3, 1)
    inputs = to_inputs(images, binarise=True)
    assert inputs.dtype == np.uint8
    assert inputs.tolist() == [[0, 0, 0, 1, 1, 1]]
