"""A split that worker processes can import: images of two pixels."""

import os
import time
from collections.abc import Collection
from pathlib import Path

import numpy as np

from experiments.data.errors import DataError
from experiments.data.splits import Example, UndecodableError


class NumberedSplit:
    """Images of two pixels: the example's number, and a random one."""

    num_classes = 10
    shard_lengths = (10, 10, 10)
    checksum = ""

    def __init__(
        self,
        broken: Collection[int] = (),
        fatal: int | None = None,
        log: Path | None = None,
        seconds: float = 0.0,
    ) -> None:
        """Takes the examples that cannot be read.

        Args:
          broken: images that cannot be decoded.
          fatal: an example in a damaged file.
          log: a folder where every process that reads leaves a file.
          seconds: that reading an example takes.
        """
        self.requested: list[int] = []
        self._broken, self._fatal = broken, fatal
        self._log, self._seconds = log, seconds

    def __len__(self) -> int:
        return 30

    def training_example(self, index: int, random: np.random.Generator) -> Example:
        self._check(index)
        number = random.integers(0, 256)
        return Example(np.array([index, number], np.uint8), index % 10)

    def evaluation_example(self, index: int, crops: int) -> Example:
        self._check(index)
        return Example(np.full((crops, 2), index, np.uint8), index % 10)

    def _check(self, index: int) -> None:
        self.requested.append(index)
        time.sleep(self._seconds)
        if self._log is not None:
            (self._log / str(os.getpid())).touch()
        if index == self._fatal:
            raise DataError(f"file of {index} is truncated")
        if index in self._broken:
            raise UndecodableError(f"image {index} is broken")
