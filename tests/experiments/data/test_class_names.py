import numpy as np

from experiments.data.class_names import class_names


def test_digits_are_called_by_their_numbers():
    for name in ("mnist", "cluttered_mnist"):
        assert class_names(name, 10, None) == tuple("0123456789")


def test_a_prepared_set_knows_its_names(tmp_path, prepare, png):
    import tensorflow_datasets as tfds

    features = {
        "image": tfds.features.Image(shape=(4, 4, 3)),
        "label": tfds.features.ClassLabel(names=["cat", "dog"]),
    }
    example = {"image": png(np.zeros((4, 4, 3), np.uint8)), "label": "dog"}
    prepare(tmp_path, {"train": [example], "test": [example]}, features)
    assert class_names("tiny", 2, str(tmp_path)) == ("cat", "dog")
    # A network of other classes, and a set that is not there.
    assert class_names("tiny", 3, str(tmp_path)) == ("0", "1", "2")
    assert class_names("absent", 2, str(tmp_path)) == ("0", "1")
