"""An image classification data set held in memory as arrays."""

import math
from collections.abc import Callable
from typing import NamedTuple

import google_crc32c
import numpy as np


class ImageSet(NamedTuple):
    """The training and test images of a classification task, with their labels."""

    train_images: np.ndarray  # uint8 (training examples, height, width, channels)
    train_labels: np.ndarray  # int32 (training examples,), in [0, num_classes)
    test_images: np.ndarray  # uint8 (test examples, height, width, channels)
    test_labels: np.ndarray  # int32 (test examples,), in [0, num_classes)
    num_classes: int

    @property
    def checksum(self) -> str:
        """Of the training images, hexadecimal: what tells two sets of a name apart."""
        return f"{google_crc32c.value(self.train_images.tobytes()):08x}"


# As the next function: of a name and the folder of prepared sets.
LoadImageSet = Callable[[str, str | None], ImageSet]


def load_image_set(name: str, data_dir: str | None = None) -> ImageSet:
    """Loads a data set by name, without downloading anything.

    Args:
      name: `"mnist"` for the MNIST files that come with the project, or the TFDS
        name of a prepared set: `"cifar10"`, `"emnist/letters"`, `"my_set:1.0.0"`.
      data_dir: the directory that holds TFDS's prepared sets. With None, `"mnist"`
        is the bundled one, and other sets are looked for in TFDS's own default.

    Returns:
      The whole set, in host memory.

    Raises:
      DataError: if the set is unknown, not prepared, damaged, too large or no image
        classification set.
    """
    # Imported here because both readers import ImageSet from this module.
    if name == "mnist" and data_dir is None:
        from experiments.data.bundled_mnist import load_bundled_mnist

        return load_bundled_mnist()
    from experiments.data.prepared import load_prepared

    return load_prepared(name, data_dir)


def to_inputs(images: np.ndarray, binarise: bool) -> np.ndarray:
    """Flattens images into the input vectors of a dense network.

    The pixels stay uint8, which is a quarter of the memory and of the transfer of
    float32: turn them to float on the device, divided by 255 unless binarised.

    Args:
      images: uint8 (examples, height, width, channels).
      binarise: whether to map pixels above 127 to 1 and the others to 0.

    Returns:
      uint8 (examples, height * width * channels).
    """
    inputs = images.reshape(len(images), math.prod(images.shape[1:]))
    return (inputs > 127).astype(np.uint8) if binarise else inputs
