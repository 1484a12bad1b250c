"""The order in which training sees the examples."""

import functools
from collections.abc import Sequence

import jax
import numpy as np


def batch_indices(
    seeds: Sequence[int],
    first_step: int,
    num_steps: int,
    num_examples: int,
    batch_size: int,
    shard_lengths: Sequence[int] | None = None,
) -> np.ndarray:
    """Returns which examples make up the batches of consecutive training steps.

    The batch of a step is a function of the seed and the step alone, so a run may be
    cut into chunks or resumed anywhere. Each epoch goes through a fresh permutation
    of the examples, `permutation(fold_in(key(seed), epoch))`; the partial batch at
    its end is dropped, and these examples have their turn in other epochs.

    Args:
      seeds: one seed for each network trained side by side.
      first_step: the number, from 0 at the start of training, of the first step.
      num_steps: how many steps to return.
      num_examples: how many training examples there are.
      batch_size: how many examples make up a batch.
      shard_lengths: if given, an epoch is a permutation of shards of so many
        consecutive examples, each read in order: the same examples always meet in a
        batch. None: a permutation of the examples.

    Returns:
      int32 (num_steps, len(seeds), batch_size), in [0, num_examples).

    Raises:
      ValueError: if batch_size is not between 1 and num_examples.
    """
    if not 1 <= batch_size <= num_examples:
        raise ValueError(
            f"batch_size is {batch_size}: expected 1 to {num_examples}, the number of "
            "training examples; choose a batch size in this range"
        )
    shards = None if shard_lengths is None else tuple(shard_lengths)
    steps_per_epoch = num_examples // batch_size
    indices = np.empty((num_steps, len(seeds), batch_size), np.int32)
    for i in range(num_steps):
        epoch, step = divmod(first_step + i, steps_per_epoch)
        order = _epoch_order(tuple(seeds), epoch, num_examples, shards)
        indices[i] = order[:, step * batch_size : (step + 1) * batch_size]
    return indices


# Consecutive calls go forward through the epochs, so remembering the last is enough;
# one more is for a caller that looks ahead. NumPy, since its slicing compiles nothing.
@functools.lru_cache(maxsize=2)
def _epoch_order(
    seeds: tuple[int, ...],
    epoch: int,
    num_examples: int,
    shard_lengths: tuple[int, ...] | None,
) -> np.ndarray:
    """Returns each seed's order of an epoch, int32 (seeds, num_examples)."""
    num_shuffled = num_examples if shard_lengths is None else len(shard_lengths)
    # One by one, as some random generators give other numbers under vmap.
    permutations = [
        np.asarray(
            jax.random.permutation(
                jax.random.fold_in(jax.random.key(seed), epoch), num_shuffled
            ),
            np.int32,
        )
        for seed in seeds
    ]
    if shard_lengths is not None:
        starts = np.cumsum(shard_lengths) - shard_lengths
        permutations = [
            np.concatenate(
                [
                    np.arange(starts[shard], starts[shard] + shard_lengths[shard])
                    for shard in permutation
                ]
            ).astype(np.int32)
            for permutation in permutations
        ]
    return np.stack(permutations)
