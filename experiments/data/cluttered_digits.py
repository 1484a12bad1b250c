"""Cluttered, translated, coloured MNIST: images composed as they are read.

A whole digit of a random light colour lies somewhere on a dark, noisy background of
another, among fragments of other digits; the task is to name it. A small stand-in for
ImageNet: position, colour and clutter vary, so that a network has to learn features
rather than templates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import google_crc32c
import numpy as np

from experiments.data.crops import evaluation_crops
from experiments.data.image_set import ImageSet, load_image_set
from experiments.data.splits import Augmentation, Example

if TYPE_CHECKING:
    from experiments.data.device_augmentation import DeviceExamples

# Chosen so that networks leave chance within hundreds of steps and separate within
# thousands: with ten fragments, and colours that may be equal, none learns for 1,000.
NUM_FRAGMENTS = 3
FRAGMENT_SIZE = 8
BACKGROUND = (0, 100)  # of 255: the range of each channel
FOREGROUND = (120, 255)
NOISE = 16  # standard deviation
# Files of a prepared data set hold about as many examples.
SHARD_LENGTH = 500
TEST_SEED = 20_150_211  # the test images are the same in every run


class ClutteredDigits:
    """A `Split` whose images are composed when they are read."""

    def __init__(
        self, digits: np.ndarray, labels: np.ndarray, augmentation: Augmentation
    ) -> None:
        """Keeps the digits; nothing is composed yet.

        Args:
          digits: uint8 (examples, 28, 28).
          labels: int32 (examples,), 0 to 9.
          augmentation: how large the images are.
        """
        self.num_classes = 10
        self._digits = digits
        self._labels = labels
        self._augmentation = augmentation

    def __len__(self) -> int:
        return len(self._labels)

    @property
    def shard_lengths(self) -> Sequence[int]:
        """Consecutive examples that count as one file."""
        whole, rest = divmod(len(self), SHARD_LENGTH)
        return (SHARD_LENGTH,) * whole + (rest,) * bool(rest)

    @property
    def checksum(self) -> str:
        """Of the digits."""
        return f"{google_crc32c.value(self._digits.tobytes()):08x}"

    @property
    def device_bytes(self) -> int:
        """The digits are composed on the devices, too."""
        return self._digits.nbytes + self._labels.nbytes

    def device_examples(self, report: Callable[[str], None]) -> DeviceExamples:
        """The digits, and how images are composed around them."""
        from experiments.data.device_augmentation import Clutter, of_digits

        clutter = Clutter(
            self._augmentation.image_size,
            *(NUM_FRAGMENTS, FRAGMENT_SIZE, BACKGROUND, FOREGROUND, NOISE),
        )
        return of_digits(self._digits, self._labels, clutter)

    def training_example(self, index: int, random: np.random.Generator) -> Example:
        """Composes an image around a digit; place, colours and clutter are random."""
        image = self._compose(index, random)
        return Example(image, int(self._labels[index]))

    def evaluation_example(self, index: int, crops: int) -> Example:
        """Composes the image that this digit has in every evaluation."""
        image = self._compose(index, np.random.default_rng([TEST_SEED, index]))
        images = evaluation_crops(image, self._augmentation, crops)
        return Example(images, int(self._labels[index]))

    def _compose(self, index: int, random: np.random.Generator) -> np.ndarray:
        size = self._augmentation.image_size
        image = random.standard_normal((size, size, 3), np.float32)
        image *= NOISE
        image += random.uniform(*BACKGROUND, 3)
        for other in random.integers(0, len(self), NUM_FRAGMENTS):
            top, left = random.integers(0, 28 - FRAGMENT_SIZE, 2, endpoint=True)
            fragment = self._digits[
                other, top : top + FRAGMENT_SIZE, left : left + FRAGMENT_SIZE
            ]
            _paint(image, fragment, random)
        _paint(image, self._digits[index], random)
        return np.clip(image, 0, 255).astype(np.uint8)


def load_cluttered_digits(
    augmentation: Augmentation,
) -> tuple[ClutteredDigits, ClutteredDigits]:
    """The training and the test images, from the MNIST that comes with the project."""
    data: ImageSet = load_image_set("mnist")
    return (
        ClutteredDigits(data.train_images[..., 0], data.train_labels, augmentation),
        ClutteredDigits(data.test_images[..., 0], data.test_labels, augmentation),
    )


def _paint(image: np.ndarray, stroke: np.ndarray, random: np.random.Generator) -> None:
    """Paints a stroke, (height, width), in a random colour at a random place."""
    colour = random.uniform(*FOREGROUND, 3)
    height, width = stroke.shape
    top = random.integers(0, image.shape[0] - height, endpoint=True)
    left = random.integers(0, image.shape[1] - width, endpoint=True)
    place = image[top : top + height, left : left + width]
    place += (stroke[..., np.newaxis] / 255) * (colour - place)
