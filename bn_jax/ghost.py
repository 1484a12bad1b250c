"""Ghost batch normalisation: each part of a batch is normalised by its own moments."""

import operator
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from bn_jax import arguments, population
from bn_jax.activations import ActivationName
from bn_jax.arguments import Options, check
from bn_jax.batch_norm import infer, normalise_by_batch
from bn_jax.layout import Layout, make_layout
from bn_jax.moments import Moments
from bn_jax.params import BatchNormParams
from bn_jax.passes import nonzero, saturated
from bn_jax.sharding import compiled, specs_of
from bn_jax.statistics import (
    BatchStats,
    PopulationMoments,
    update_stats,
    without_nonfinite,
)

Statistics = TypeVar("Statistics", BatchStats, PopulationMoments)


def ghost_batch_norm(
    params: BatchNormParams,
    stats: Statistics,
    x: ArrayLike,
    *,
    train: bool,
    virtual_batch_size: int,
    batch_axis: int = 0,
    axis: int | Sequence[int] = -1,
    decay: ArrayLike = 0.99,
    eps: float = 1e-5,
    weights: ArrayLike | None = None,
    activation: ActivationName | None = None,
    unbiased: bool = True,
    single_value: Literal["error", "bias"] = "error",
    skip_nonfinite: bool = False,
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
      activation: fused into the transform; see `batch_norm`.
      unbiased: unbiased running variance; False divides by sum(m_i).
      single_value: see `batch_norm`; of a virtual batch.
      skip_nonfinite: see `batch_norm`.

    Returns:
      y, of x's shape and dtype, and the new statistics in the old ones' dtype.

    Raises:
      TypeError: as `batch_norm`; `virtual_batch_size` or `batch_axis` is no integer.
      ValueError: as `batch_norm`; `virtual_batch_size` does not divide the batch;
        `batch_axis` is out of range or a feature axis.
    """
    call = check(
        params,
        stats,
        x,
        train=train,
        gathering=(PopulationMoments,),
        axis=axis,
        decay=decay,
        eps=eps,
        weights=weights,
        activation=activation,
        unbiased=unbiased,
        single_value="bias",
        skip_nonfinite=skip_nonfinite,
    )
    batch_axis = _check_batch_axis(call.x, call.layout, batch_axis)
    size = _check_virtual_batch_size(call.x, batch_axis, virtual_batch_size)
    if not train:
        return infer(call), stats
    virtual = _Virtual(call.options, batch_axis, size)
    if single_value == "error":
        divided = virtual.divided(call.x.shape)
        arguments.check_num_values(call.x, make_layout(divided, virtual.feature_axes))
    result: tuple[jax.Array, Statistics] = _train_step(virtual, *call[1:])
    return result


class _Virtual(NamedTuple):
    """A batch axis that is divided: virtual batches are like further features."""

    options: Options
    batch_axis: int
    size: int  # examples of a virtual batch

    @property
    def feature_axes(self) -> tuple[int, ...]:
        """Those of the divided input, that of the virtual batches among them."""
        b = self.batch_axis
        moved = (axis + (axis > b) for axis in self.options.feature_axes)
        return tuple(sorted((b, *moved)))

    @property
    def among_features(self) -> int:
        """Where the axis of the virtual batches is among the feature axes."""
        return self.feature_axes.index(self.batch_axis)

    def divided(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """A shape whose batch axis is two: virtual batches, and examples of each."""
        b = self.batch_axis
        # Weights of size 1 there are the same for all examples.
        split = (1, 1) if shape[b] == 1 else (shape[b] // self.size, self.size)
        return (*shape[:b], *split, *shape[b + 1 :])

    def repeat(self, per_feature: Any, number: int) -> Any:
        """Gives each virtual batch the same per-feature arrays."""

        def repeated(array: jax.Array) -> jax.Array:
            array = jnp.expand_dims(array, self.among_features)
            shape = list(array.shape)
            shape[self.among_features] = number
            return jnp.broadcast_to(array, shape)

        return jax.tree.map(repeated, per_feature)


def _like_x_and_stats(_: _Virtual, params: Any, stats: Any, x: Any, *__: Any) -> Any:
    return specs_of((x, stats))


@compiled(_like_x_and_stats)
def _train_step(
    virtual: _Virtual,
    params: BatchNormParams,
    stats: Statistics,
    x: jax.Array,
    weights: jax.Array | None,
    decay: jax.Array,
) -> tuple[jax.Array, Statistics]:
    number = x.shape[virtual.batch_axis] // virtual.size
    params, old = virtual.repeat((params, BatchStats(stats.mean, stats.var)), number)
    if weights is not None:
        weights = weights.reshape(virtual.divided(weights.shape))
    options = virtual.options._replace(feature_axes=virtual.feature_axes)
    y, parts = normalise_by_batch(
        options, params, x.reshape(virtual.divided(x.shape)), weights, old, None
    )
    y = y.reshape(x.shape)
    parts = Moments(*(jnp.moveaxis(p, virtual.among_features, 0) for p in parts))
    if isinstance(stats, PopulationMoments):
        each = (Moments(*(field[i] for field in parts)) for i in range(number))
        return y, population.update(stats, *each)
    if options.skip_nonfinite:
        parts = without_nonfinite(parts)
    average = _average(parts, options.unbiased)
    return y, update_stats(stats, average, decay=decay, unbiased=False)


def _average(parts: Moments, unbiased: bool) -> Moments:
    """Averages moments along their leading axis, each as often as it has values."""
    count = parts.count.sum(0, keepdims=True)
    # Each nonempty part has one degree of freedom less than it has values.
    means_taken = (parts.count > 0).sum(0, keepdims=True) if unbiased else 0
    freedom = jnp.maximum(count - jnp.asarray(means_taken, count.dtype), 1)
    return Moments(
        count=count[0],
        mean=(parts.count / nonzero(count) * parts.mean).sum(0),
        var=saturated((parts.count / freedom * parts.var).sum(0)),
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
