"""The data sets of section 4.2's experiment, by name."""

from experiments.data.errors import DataError
from experiments.data.splits import Augmentation, Split

CLUTTERED_MNIST = "cluttered_mnist"
# Known before the data is at hand, for a description of the network.
NUM_CLASSES = {"imagenet2012": 1000, CLUTTERED_MNIST: 10}


def load_splits(
    name: str, data_dir: str | None, augmentation: Augmentation
) -> tuple[Split, Split]:
    """Opens the training and the test, or else the validation, examples of a data set.

    Args:
      name: `CLUTTERED_MNIST`, which is composed of the bundled digits, or the name of
        an image classification set that tensorflow-datasets has prepared.
      data_dir: folder of prepared sets, or None for TFDS's default.
      augmentation: how images become what the network sees.

    Raises:
      DataError: there is no such set, or it cannot be read; the message says what to
        do.
    """
    # Imported here because each brings what the other does not need.
    if name == CLUTTERED_MNIST:
        if data_dir is not None:
            raise DataError(
                f"--data_dir={data_dir}: {name} is composed of the bundled digits, and "
                "reads no other; leave it out, or name your set: --config.dataset=NAME."
            )
        from experiments.data.cluttered_digits import load_cluttered_digits

        return load_cluttered_digits(augmentation)
    from experiments.data.prepared_splits import load_prepared_splits

    return load_prepared_splits(name, data_dir, augmentation)
