"""Ghost batch normalisation: each part of a batch is normalised by its own moments."""

import functools
import operator
from collections.abc import Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp

from bn_jax import arguments, population
from bn_jax.layout import Layout, make_layout
from bn_jax.moments import Moments, check_weights, nonzero_count
from bn_jax.params import BatchNormParams
from bn_jax.statistics import BatchStats, PopulationMoments, update_stats
from bn_jax.transform import batch_norm

Statistics = TypeVar("Statistics", BatchStats, PopulationMoments)


def ghost_batch_norm(
    params: BatchNormParams,
    stats: Statistics,
    x: jax.Array,
    *,
    train: bool,
    virtual_batch_size: int,
    batch_axis: int = 0,
    axis: int | Sequence[int] = -1,
    decay: float | jax.Array = 0.99,
    eps: float = 1e-3,
    weights: jax.Array | None = None,
    activation: str | None = None,
    unbiased: bool = True,
) -> tuple[jax.Array, Statistics]:
    """Batch normalisation over virtual batches (Hoffer, Hubara & Soudry 2017).

    Training divides the batch, in its order, into virtual batches of one size and
    normalises each by its own moments, as `batch_norm` does on as many devices that
    share nothing. A large batch then trains with the noise, and the regularisation, of
    a small one. Inference is `batch_norm`'s.

    The statistics move once, towards averages over the virtual batches in which a
    virtual batch counts as much as it has values: the mean of the means, and the
    variance within virtual batches, sum(m_i * var_i) / sum(m_i - 1), which without
    weights is the mean of the unbiased variances m_i / (m_i - 1) * var_i (Algorithm 2).

    There is no `axis_name`: moments stay on their device. Average the new statistics
    over devices with `jax.lax.pmean`, once for the whole network.

    Args:
      params: scale and bias, (features) each; None for either leaves it out.
      stats: mean and variance, (features) each, float32 or float64. In training also
        `PopulationMoments`, which gather the virtual batches.
      x: any rank; float16, bfloat16, float32 or float64.
      train: normalise by the virtual batches (True) or by the statistics (False).
      virtual_batch_size: examples of a virtual batch; divides the size of the batch.
      batch_axis: the axis of x that examples lie along.
      axis: the feature axis or axes.
      decay: the statistics become decay * old + (1 - decay) * batch. May be traced.
      eps: added to the variance.
      weights: 0 for padding, or example weights; see `batch_norm`. A virtual batch of
        padding alone gives zeros and does not count in the statistics.
      activation: None, or "relu" fused into the transform.
      unbiased: unbiased running variance; False divides by sum(m_i).

    Returns:
      y, of x's shape and dtype, and the new statistics in the old ones' dtype.

    Raises:
      TypeError: as `batch_norm`; `virtual_batch_size` or `batch_axis` is no integer.
      ValueError: as `batch_norm`; `virtual_batch_size` does not divide the batch;
        `batch_axis` is out of range or a feature axis.
    """
    x = jnp.asarray(x)
    layout = make_layout(x.shape, axis)
    weights = check_weights(x, weights)
    batch_axis = _check_batch_axis(x, layout, batch_axis)
    size = _check_virtual_batch_size(x, batch_axis, virtual_batch_size)
    if not train:
        return batch_norm(
            params,
            stats,
            x,
            train=False,
            axis=axis,
            eps=eps,
            weights=weights,
            activation=activation,
        )
    arguments.check_types(params, stats, gathering=True)

    def normalise(x: jax.Array, weights: jax.Array | None) -> tuple[jax.Array, Moments]:
        # With a decay of 0 the new statistics are the virtual batch's own.
        y, own = batch_norm(
            params,
            BatchStats(stats.mean, stats.var),
            x,
            train=True,
            axis=layout.feature_axes,
            decay=0.0,
            eps=eps,
            weights=weights,
            activation=activation,
            unbiased=False,
        )
        values = jnp.ones((), own.mean.dtype) if weights is None else weights
        values = jax.lax.stop_gradient(values)
        count = jnp.broadcast_to(values, x.shape).sum(layout.position_axes)
        return y, Moments(count, own.mean, own.var)

    divide = functools.partial(_divide, axis=batch_axis, size=size)
    weights_axis = None  # of size 1 there, weights are the same for all virtual batches
    if weights is not None and weights.shape[batch_axis] > 1:
        weights, weights_axis = divide(weights), batch_axis
    y, parts = jax.vmap(
        normalise, in_axes=(batch_axis, weights_axis), out_axes=(batch_axis, 0)
    )(divide(x), weights)
    y = y.reshape(x.shape)
    if isinstance(stats, PopulationMoments):
        return y, population.update(stats, *map(Moments, *parts))
    average = _average(parts, unbiased)
    return y, update_stats(stats, average, decay=decay, unbiased=False)


def _divide(array: jax.Array, axis: int, size: int) -> jax.Array:
    """Splits an axis into two: virtual batches, and the examples of each."""
    shape = array.shape
    return array.reshape(*shape[:axis], -1, size, *shape[axis + 1 :])


def _average(parts: Moments, unbiased: bool) -> Moments:
    """Averages moments along their leading axis, each as often as it has values."""
    count = parts.count.sum(0)
    # Each nonempty part has one degree of freedom less than it has values.
    means_taken = (parts.count > 0).astype(count.dtype).sum(0) if unbiased else 0
    freedom = jnp.maximum(count - means_taken, 1)
    return Moments(
        count=count,
        mean=(parts.count * parts.mean).sum(0) / nonzero_count(count),
        var=(parts.count * parts.var).sum(0) / freedom,
    )


def _check_batch_axis(x: jax.Array, layout: Layout, batch_axis: int) -> int:
    """The axis that examples lie along, not negative."""
    (index,) = make_layout(x.shape, (batch_axis,)).feature_axes
    if index in layout.feature_axes:
        raise ValueError(
            f"batch_axis={batch_axis} is one of the feature axes {layout.feature_axes} "
            f"of x of shape {x.shape}; name the axis that examples lie along."
        )
    return index


def _check_virtual_batch_size(x: jax.Array, batch_axis: int, size: int) -> int:
    try:
        size = operator.index(size)
    except TypeError:
        raise TypeError(
            "virtual_batch_size must be an integer known when tracing, got "
            f"{type(size).__name__}."
        ) from None
    batch_size = x.shape[batch_axis]
    if size < 1 or batch_size % size:
        raise ValueError(
            f"virtual_batch_size={size} does not divide a batch of {batch_size} (x of "
            f"shape {x.shape}, batch_axis {batch_axis}); choose a divisor, or pad the "
            "batch and give the padding a weight of 0."
        )
    return size
