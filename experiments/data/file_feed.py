"""Batches of decoded images, made ahead by Grain while the devices compute.

Worker processes make whole batches, each every so many steps, and hand them over in
shared memory: threads would share one interpreter, which decodes no faster on sixteen
cores than on eight. No iterator's state is ever stored, since a batch follows from the
seed and the step alone: a run that goes on starts at its step.
"""

import functools
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from absl import flags

from experiments.data.batches import batch_indices
from experiments.data.core_processes import leave_signals_to_parent
from experiments.data.errors import DataError
from experiments.data.splits import Example, Split, UndecodableError

BATCHES_AHEAD = 2  # of every worker, beside the one in use
MAX_SUCCESSORS = 100  # tried in place of an image that cannot be decoded


class ImageBatch(NamedTuple):
    """Images as they are stored, with their labels."""

    # uint8 (examples, size, size, 3); (examples, crops, size, size, 3) to test
    images: np.ndarray
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

    def add(self, message: str) -> None:
        """Counts an image, once however often it is met.

        Args:
          message: names the image, and says what is wrong with it.

        Raises:
          DataError: there are more than the limit.
        """
        self.messages[message] = None
        if len(self.messages) > self._limit:
            raise DataError(
                f"more than {self._limit} images cannot be decoded, the last is: "
                f"{message}; restore the data, or raise max_undecodable."
            )


def training_batches(
    split: Split,
    steps: range,
    *,
    seed: int,
    batch_size: int,
    shuffle: str,
    workers: int,
    undecodable: UndecodableImages,
    part: tuple[int, int] = (0, 1),
) -> Generator[ImageBatch]:
    """Makes the batches of consecutive training steps, ahead of their use.

    A batch is a function of the seed and the step alone, as is every image's
    augmentation, for any number of workers; with several processes each makes its part
    of the same batch.

    Args:
      split: the training examples. Workers receive a pickled copy.
      steps: their numbers, from 0 at the start of training.
      seed: of the order and of the augmentation.
      batch_size: examples a step, over all processes.
      shuffle: "examples", or "shards", which are then read in order.
      workers: processes that make batches. 0: a thread of this process.
      undecodable: receives images that cannot be decoded; the next example that can
        takes their place.
      part: of the batch to make: its number and how many there are.

    Yields:
      A batch a step, with batch_size divided by the number of parts.

    Raises:
      DataError: too many images cannot be decoded, or files are damaged.
    """
    make = functools.partial(
        _training_batch,
        split,
        seed,
        batch_size,
        tuple(split.shard_lengths) if shuffle == "shards" else None,
        _positions(batch_size, part),
    )
    return _made_ahead(make, steps, workers, undecodable)


def evaluation_batches(
    split: Split,
    num_examples: int,
    *,
    batch_size: int,
    crops: int,
    workers: int,
    undecodable: UndecodableImages,
    part: tuple[int, int] = (0, 1),
) -> Generator[ImageBatch]:
    """Makes batches of a split's first examples, in order.

    Args:
      split: the examples. Workers receive a pickled copy.
      num_examples: how many to take.
      batch_size: of every batch: the last is padded.
      crops: a number that `experiments.data.crops` knows.
      workers: as for `training_batches`.
      undecodable: receives images that cannot be decoded; they are masked, and the
        next that can be takes their place.
      part: of every batch to make: its number and how many there are.

    Yields:
      Batches with several images an example. Padding repeats examples, so that a
      batch's own statistics stay those of images.

    Raises:
      DataError: too many images cannot be decoded, or files are damaged.
    """
    make = functools.partial(
        _evaluation_batch,
        split,
        num_examples,
        batch_size,
        crops,
        _positions(batch_size, part),
    )
    numbers = range(-(-num_examples // batch_size))
    return _made_ahead(make, numbers, workers, undecodable)


class _Made(NamedTuple):
    """A batch, and what a worker has to say about it."""

    batch: ImageBatch
    undecodable: tuple[str, ...]


def _positions(batch_size: int, part: tuple[int, int]) -> range:
    """The places in a batch that are this process' to fill."""
    number, count = part
    return range(number * batch_size // count, (number + 1) * batch_size // count)


def _training_batch(
    split: Split,
    seed: int,
    batch_size: int,
    shard_lengths: tuple[int, ...] | None,
    positions: range,
    step: int,
) -> _Made:
    indices = batch_indices([seed], step, 1, len(split), batch_size, shard_lengths)
    random_at = image_randomness(seed, step)
    examples, undecodable = [], []
    for position in positions:

        def read(index: int, position: int = position) -> Example:
            return split.training_example(index, random_at(position))

        index = int(indices[0, 0, position])
        example, broken = first_decodable(split, index, read)
        examples.append(example)
        undecodable += broken
    return _stack(examples, np.ones(len(examples), bool), undecodable)


def _evaluation_batch(
    split: Split,
    num_examples: int,
    batch_size: int,
    crops: int,
    positions: range,
    number: int,
) -> _Made:
    start = number * batch_size
    count = min(batch_size, num_examples - start)
    examples, mask, undecodable = [], [], []
    for position in positions:
        example, broken = first_decodable(
            split,
            start + position % count,
            lambda index: split.evaluation_example(index, crops),
        )
        examples.append(example)
        mask.append(position < count and not broken)
        undecodable += broken
    return _stack(examples, np.array(mask, bool), undecodable)


def image_randomness(seed: int, step: int) -> Callable[[int], np.random.Generator]:
    """Returns what gives each place in a step's batch its random generator.

    It is one generator, whose counter is set to a stretch of numbers of its own for
    each place: making one for every image costs as much as cropping a small one.
    """
    bits = np.random.Philox(key=np.array([seed, 0], np.uint64))
    generator = np.random.Generator(bits)
    state: Any = dict(bits.state)
    key = state["state"]["key"]

    def random_at(position: int) -> np.random.Generator:
        counter = np.array([0, 0, position, step], np.uint64)
        bits.state = state | {"state": {"counter": counter, "key": key}}
        return generator

    return random_at


def first_decodable(
    split: Split, index: int, read: Callable[[int], Example]
) -> tuple[Example, list[str]]:
    """An example, or the next that can be decoded, and what is wrong with the others.

    Raises:
      DataError: none of many can.
    """
    broken: list[str] = []
    for successor in range(MAX_SUCCESSORS):
        try:
            return read((index + successor) % len(split)), broken
        except UndecodableError as error:
            broken.append(str(error))
    raise DataError(
        f"{MAX_SUCCESSORS} consecutive images, from number {index} on, cannot be "
        "decoded; restore the data."
    )


def _stack(examples: list[Example], mask: np.ndarray, undecodable: list[str]) -> _Made:
    batch = ImageBatch(
        np.stack([example.images for example in examples]),
        np.array([example.label for example in examples], np.int32),
        mask,
    )
    return _Made(batch, tuple(undecodable))


def _made_ahead(
    make: Callable[[int], _Made],
    numbers: range,
    workers: int,
    undecodable: UndecodableImages,
) -> Generator[ImageBatch]:
    """Yields what `make` makes of numbers, in order, and counts what is broken."""
    batches = _start(make, numbers, workers)
    try:
        for made in batches:
            for message in made.undecodable:
                undecodable.add(message)
            yield made.batch
    finally:
        # Ends the workers, also when the consumer stops early.
        batches.close()  # type: ignore[attr-defined]


def _start(
    make: Callable[[int], _Made], numbers: range, workers: int
) -> Iterator[_Made]:
    import grain

    # Grain asks absl for flags of its own, which outside of absl.app nobody parsed.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    batches = grain.MapDataset.range(numbers.stop)[numbers.start :].map(make)
    if not workers:
        ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=BATCHES_AHEAD)
        return iter(batches.to_iter_dataset(ahead))
    at_once = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    options = grain.MultiprocessingOptions(workers, BATCHES_AHEAD)
    made = batches.map(_in_shared_memory).to_iter_dataset(at_once)
    return iter(made.mp_prefetch(options, _prepare_worker))


def _in_shared_memory(made: _Made) -> _Made:
    """Moves the images to where the parent process reads them.

    Grain would copy them there, page by page as it touches them, which costs a tenth
    of the time in which they are decoded; a file is written at half of that.
    """
    from grain.multiprocessing import SharedMemoryArray

    images = made.batch.images
    shared = SharedMemoryArray(images.shape, images.dtype)
    file = Path("/dev/shm") / shared.metadata.name
    if file.exists():
        with file.open("r+b", buffering=0) as written:
            written.write(images.data)
    else:  # not Linux
        np.copyto(shared, images)
    return made._replace(batch=made.batch._replace(images=shared))


def _prepare_worker(number: int, count: int) -> None:
    """Readies a worker process: it takes no accelerator, and ends with its parent."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    # Every core has a worker; OpenCV's own threads would only compete with them.
    cv2.setNumThreads(0)
    # The parent may still want batches.
    leave_signals_to_parent()
