"""Batches of decoded images, made by threads while the devices compute."""

import collections
import functools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np

from experiments.data.batches import batch_indices
from experiments.data.errors import DataError
from experiments.data.splits import Example, Split, UndecodableError

BATCHES_AHEAD = 4  # decoded, or being decoded, beside the one in use
MAX_SUCCESSORS = 100  # tried in place of an image that cannot be decoded

Made = TypeVar("Made")


class ImageBatch(NamedTuple):
    """Images as they are stored, with their labels."""

    images: (
        np.ndarray
    )  # uint8 (examples, size, size, 3); (examples, crops, ...) to test
    labels: np.ndarray  # int32 (examples,)
    mask: np.ndarray  # bool (examples,): False for padding, and what is undecodable


class UndecodableImages:
    """Counts images that cannot be decoded, and stops a run that meets too many."""

    def __init__(self, limit: int) -> None:
        """Starts with none.

        Args:
          limit: how many different images may be broken.
        """
        self.messages: dict[str, None] = {}
        self._limit = limit

    def add(self, error: UndecodableError) -> None:
        """Counts an image, once however often it is met.

        Raises:
          DataError: there are more than the limit.
        """
        self.messages[str(error)] = None
        if len(self.messages) > self._limit:
            raise DataError(
                f"more than {self._limit} images cannot be decoded, the last is: "
                f"{error}; restore the data, or raise max_undecodable."
            )


def training_batches(
    split: Split,
    steps: range,
    *,
    seed: int,
    batch_size: int,
    shuffle: str,
    threads: int,
    undecodable: UndecodableImages,
    part: tuple[int, int] = (0, 1),
) -> Generator[ImageBatch]:
    """Makes the batches of consecutive training steps, ahead of their use.

    A batch is a function of the seed and the step alone, as is every image's
    augmentation; with several processes each makes its part of the same batch.

    Args:
      split: the training examples.
      steps: their numbers, from 0 at the start of training.
      seed: of the order and of the augmentation.
      batch_size: examples a step, over all processes.
      shuffle: "examples", or "shards", which are then read in order.
      threads: that make images.
      undecodable: receives images that cannot be decoded; the next example that can
        takes their place.
      part: of the batch to make: its number and how many there are.

    Yields:
      A batch a step, with batch_size divided by the number of parts.

    Raises:
      DataError: too many images cannot be decoded, or files are damaged.
    """
    shard_lengths = split.shard_lengths if shuffle == "shards" else None
    own = _own(batch_size, part)

    def make(step: int, position: int, index: int) -> Example:
        def read(index: int) -> Example:
            random = np.random.default_rng([seed, step, position])
            return split.training_example(index, random)

        return _decodable(split, index, read, undecodable)[0]

    def tasks() -> Iterator[list[Callable[[], Example]]]:
        for step in steps:
            indices = batch_indices(
                [seed], step, 1, len(split), batch_size, shard_lengths
            )
            yield [
                functools.partial(make, step, position, int(index))
                for position, index in list(enumerate(np.asarray(indices)[0, 0]))[own]
            ]

    for examples in _in_threads(tasks(), threads):
        yield _stack(examples, np.ones(len(examples), bool))


def evaluation_batches(
    split: Split,
    num_examples: int,
    *,
    batch_size: int,
    crops: int,
    threads: int,
    undecodable: UndecodableImages,
    part: tuple[int, int] = (0, 1),
) -> Generator[ImageBatch]:
    """Makes batches of a split's first examples, in order.

    Args:
      split: the examples.
      num_examples: how many to take.
      batch_size: of every batch: the last is padded.
      crops: a number that `experiments.data.crops` knows.
      threads: that make images.
      undecodable: receives images that cannot be decoded; they are masked, and the
        next that can be takes their place.
      part: of every batch to make: its number and how many there are.

    Yields:
      Batches with several images an example. Padding repeats examples, so that a
      batch's own statistics stay those of images.

    Raises:
      DataError: too many images cannot be decoded, or files are damaged.
    """

    def read(index: int) -> Example:
        return split.evaluation_example(index, crops)

    def make(index: int, is_padding: bool) -> tuple[Example, bool]:
        example, successor = _decodable(split, index, read, undecodable)
        return example, not (is_padding or successor)

    own = _own(batch_size, part)
    tasks: Iterator[list[Callable[[], tuple[Example, bool]]]] = (
        [
            functools.partial(make, start + position % count, position >= count)
            for position in range(batch_size)[own]
        ]
        for start in range(0, num_examples, batch_size)
        for count in [min(batch_size, num_examples - start)]
    )
    for found in _in_threads(tasks, threads):
        examples, mask = zip(*found, strict=True)
        yield _stack(examples, np.array(mask))


def _own(batch_size: int, part: tuple[int, int]) -> slice:
    number, count = part
    return slice(number * batch_size // count, (number + 1) * batch_size // count)


def _decodable(
    split: Split,
    index: int,
    read: Callable[[int], Example],
    undecodable: UndecodableImages,
) -> tuple[Example, int]:
    """An example, or the next that can be decoded, and how many come before it."""
    for successor in range(MAX_SUCCESSORS):
        try:
            return read((index + successor) % len(split)), successor
        except UndecodableError as error:
            undecodable.add(error)
    raise DataError(
        f"{MAX_SUCCESSORS} consecutive images, from number {index} on, cannot be "
        "decoded; restore the data."
    )


def _in_threads(
    batches: Iterable[list[Callable[[], Made]]], threads: int
) -> Iterator[list[Made]]:
    """Runs the tasks of some batches ahead, and yields their results in order."""
    ahead: collections.deque[list[Future[Made]]] = collections.deque()
    pool = ThreadPoolExecutor(threads, "images")
    try:
        for tasks in batches:
            ahead.append([pool.submit(task) for task in tasks])
            if len(ahead) > BATCHES_AHEAD:
                yield [future.result() for future in ahead.popleft()]
        while ahead:
            yield [future.result() for future in ahead.popleft()]
    finally:
        # When the consumer stops early, nobody wants what is left.
        pool.shutdown(cancel_futures=True)


def _stack(examples: Sequence[Example], mask: np.ndarray) -> ImageBatch:
    return ImageBatch(
        np.stack([example.images for example in examples]),
        np.array([example.label for example in examples], np.int32),
        mask,
    )
