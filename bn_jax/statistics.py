"""Statistics of a layer: the moving average, and those that gather batches instead."""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from bn_jax.moments import Moments
from bn_jax.passes import saturated


class BatchStats(NamedTuple):
    """Estimates of the population's mean and variance, used at inference."""

    mean: jax.Array  # (features), float32 or float64
    var: jax.Array  # (features), same dtype


class PopulationMoments(NamedTuple):
    """What the batches so far say about the population, per feature.

    In the place of `BatchStats`, `bn_jax.batch_norm` in training adds its batch's
    moments to it. All fields are (features), float32 or float64.
    """

    # The checker minds that the name hides tuple.count.
    count: jax.Array  # type: ignore[assignment] # values, or their total weight
    mean: jax.Array  # of all values
    var: jax.Array  # of all values, biased
    var_within: jax.Array  # of values about the mean of their own batch, biased
    num_batches: jax.Array  # batches that had a value


class MicroBatchStats(NamedTuple):
    """A layer's statistics while it trains on one part of a larger batch.

    In the place of `BatchStats`, `bn_jax.batch_norm` in training normalises by the
    moments of the whole batch, and returns what the part contributes to them.
    """

    mean: jax.Array  # as of `BatchStats`: the old one, then moved by the whole batch
    var: jax.Array
    whole: Moments  # of the whole batch; gradients flow into mean and variance
    part: Moments  # of the micro-batch, on all devices that share it; 0 before the call
    # What the micro-batch, on this device, adds to the whole batch's mean and variance:
    # of use by its derivatives alone. 0 before the call.
    influence: Moments


AnyStats = BatchStats | PopulationMoments | MicroBatchStats
Statistics = TypeVar("Statistics", BatchStats, PopulationMoments, MicroBatchStats)


def init_stats(
    num_features: int | Sequence[int], dtype: DTypeLike = jnp.float32
) -> BatchStats:
    """Statistics before the first batch: mean 0 and variance 1, as Flax has them.

    Args:
      num_features: size of the feature axis, or the sizes of several.
      dtype: float32, or float64 to match float64 input.
    """
    return BatchStats(
        mean=jnp.zeros(num_features, dtype), var=jnp.ones(num_features, dtype)
    )


def update_stats(
    stats: BatchStats, batch: Moments, *, decay: ArrayLike, unbiased: bool
) -> BatchStats:
    """Moves statistics towards those of one batch: decay * old + (1 - decay) * batch.

    Args:
      stats: the old statistics.
      batch: moments of the batch, shared over devices or not.
      decay: the share of the old statistics that stays.
      unbiased: multiply the batch's variance by m / (m - 1), as Algorithm 2 has it,
        where m is the moments' count. Weights are counts here: a total weight below 2
        gives no meaningful correction, and is taken as 2.

    Returns:
      New statistics in the old ones' dtype; the old ones where the count is 0, or the
      decay 1. No gradient flows into them.
    """
    var = batch.var
    if unbiased:
        m = jnp.maximum(batch.count, 2)
        var = saturated(var * (m / (m - 1)))
    # Not what 0 times an infinite batch would make of the old ones.
    moves = (batch.count > 0) & (jnp.asarray(decay) < 1)

    def move(old: jax.Array, new: jax.Array) -> jax.Array:
        moved = decay * old + (1 - decay) * new.astype(old.dtype)
        return jnp.where(moves, moved, old).astype(old.dtype)

    moved = BatchStats(move(stats.mean, batch.mean), move(stats.var, var))
    return jax.lax.stop_gradient(moved)


def without_nonfinite(batch: Moments) -> Moments:
    """The batch's moments, or those of no values if any of them is not finite.

    A count of 0 leaves all statistics as they are. The moments of finite values are
    finite.
    """
    finite = jnp.all(jnp.isfinite(batch.mean) & jnp.isfinite(batch.var))
    return Moments(*(jnp.where(finite, field, 0) for field in batch))
