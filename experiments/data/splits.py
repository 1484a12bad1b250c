"""What training and evaluation read: labelled images, by their number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

if TYPE_CHECKING:
    from experiments.data.device_augmentation import DeviceExamples


class UndecodableError(ValueError):
    """An image cannot be decoded; the message names it and says why."""


class Example(NamedTuple):
    """One labelled image as a network sees it."""

    images: np.ndarray  # uint8 (size, size, 3), or of several crops (crops, ...)
    label: int


class Augmentation(NamedTuple):
    """How an image becomes what a network sees."""

    image_size: int  # side of the square that the network sees, in pixels
    min_area: float  # of a training crop, as a share of the image; 1: all of it
    flip: bool  # mirror half of the training images, and crops in evaluation
    crop_fraction: float  # of the shorter side, seen by a centre crop


class Split(Protocol):
    """One part of a data set.

    It can be pickled: worker processes read from copies.
    """

    num_classes: int

    @property
    def shard_lengths(self) -> Sequence[int]:
        """How many consecutive examples lie in each file."""

    def __len__(self) -> int:
        """The number of examples."""

    @property
    def checksum(self) -> str:
        """What tells two sets of a name and size apart: of a sample, hexadecimal."""

    @property
    def device_bytes(self) -> int | None:
        """What all examples take on a device; None if their sizes differ."""

    def device_examples(self, report: Callable[[str], None]) -> DeviceExamples:
        """All examples, to be augmented on the devices.

        Args:
          report: receives what is wrong with an image that cannot be decoded; the next
            that can takes its place.
        """

    def training_example(self, index: int, random: np.random.Generator) -> Example:
        """Reads an example and augments it.

        Raises:
          UndecodableError: its image cannot be decoded.
        """

    def evaluation_example(self, index: int, crops: int) -> Example:
        """Reads an example as 1, 10 or 144 crops.

        Raises:
          UndecodableError: its image cannot be decoded.
        """
