"""What the classes of a data set are called."""

from experiments.data.datasets import CLUTTERED_MNIST
from experiments.data.errors import DataError

BUNDLED = ("mnist", CLUTTERED_MNIST)  # whose classes are digits


def class_names(
    dataset: str, num_classes: int, data_dir: str | None
) -> tuple[str, ...]:
    """The names, in the order of the labels.

    Args:
      dataset: as for `load_splits` or `load_image_set`.
      num_classes: that a network knows.
      data_dir: folder of prepared sets, or None for TFDS's default.

    Returns:
      The set's own names; numbers, where it is not there or has other classes.
    """
    numbers = tuple(map(str, range(num_classes)))
    if dataset in BUNDLED and data_dir is None:
        return numbers
    # Imported here: the bundled sets need no TFDS.
    from experiments.data.metadata import choose_features, read_info

    try:
        info = read_info(dataset, data_dir)
        label = info.features[choose_features(dataset, info).label_key]
    except DataError:
        return numbers
    return tuple(label.names) if label.num_classes == num_classes else numbers
