"""Which examples make up the steps of training on data that lies on the devices."""

from collections.abc import Generator, Sequence

import jax
import numpy as np

from experiments.data.batches import batch_indices
from experiments.distributed import parallel

BYTES_WITHOUT_LIMIT = 2 * 2**30  # that data may take where a device has no limit
SHARE_OF_MEMORY = 1 / 4  # that data may take of a device's


class DeviceFeed:
    """Pieces of many steps, as indices of examples, divided over the devices.

    The order is that of `experiments.data.file_feed`.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        num_examples: int,
        batch_size: int,
        shard_lengths: Sequence[int] | None = None,
        steps_per_piece: int = 1_000,
    ) -> None:
        """Takes what the order depends on.

        Args:
          seeds: one for each network trained side by side.
          num_examples: of the training set.
          batch_size: examples a step, over all devices.
          shard_lengths: as for `batch_indices`.
          steps_per_piece: at most, in one compiled loop.
        """
        self._order = (num_examples, batch_size, shard_lengths)
        self._seeds, self._steps_per_piece = seeds, steps_per_piece

    def __call__(
        self, first: int, stops: Sequence[int]
    ) -> Generator[tuple[int, np.ndarray]]:
        """Yields numbers of steps, and their indices as `indices` gives them."""
        for stop in stops:
            while first < stop:
                count = min(stop - first, self._steps_per_piece)
                yield count, self.indices(first, count)
                first += count

    def indices(self, first: int, count: int) -> np.ndarray:
        """Of consecutive steps: (devices, steps, seeds, examples of a device), int32.

        Of the devices and examples, this process' part.
        """
        indices = batch_indices(self._seeds, first, count, *self._order)
        return parallel.shard(parallel.own_part(indices, axis=2), axis=2)


def fits_on_device(num_bytes: int) -> bool:
    """Whether data may stay in the memory of each device."""
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    most = SHARE_OF_MEMORY * limit if limit else BYTES_WITHOUT_LIMIT
    return num_bytes <= most
