"""Count, mean and variance of a batch, and merging them exactly over its parts."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bn_jax import collectives
from bn_jax.collectives import AxisIndexGroups, AxisName
from bn_jax.fusion import computed_once, position_mean, position_sums
from bn_jax.layout import Layout, make_layout
from bn_jax.platforms import by_platform

# The shift of the variance is the mean of one position in so many, where that leaves
# enough of them.
SAMPLING = 8
MIN_SAMPLE = 128


class Moments(NamedTuple):
    """First and second moments of a set of values, per feature.

    A count travels with the moments so that those of any parts, however uneven, merge
    exactly.
    """

    # All (features), float32 or float64. `count` is the number of values, or their
    # total weight; the checker minds that the name hides tuple.count.
    count: jax.Array  # type: ignore[assignment]
    mean: jax.Array  # 0 where count is 0
    var: jax.Array  # biased: sum((x - mean)^2) / count


def moments(
    x: jax.Array,
    *,
    axis: int | Sequence[int] = -1,
    weights: jax.Array | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: AxisIndexGroups | None = None,
) -> Moments:
    """Mean and biased variance over all positions (Algorithm 1, lines 1 and 2).

    One pass over deviations from a shift, whose own mean then corrects mean and
    variance (Chan, Golub & LeVeque 1983, "Algorithms for computing the sample
    variance", the shifted form). The shift is the mean of an eighth of the positions,
    or with weights, some of which may be 0, that of all positions.

    Next to nothing cancels, however far the mean is from zero and however the values
    are ordered: the variance between a part with the share f of the values and the
    rest is f / (1 - f) * (shift - mean)^2 and cannot exceed the whole variance, so the
    square that is taken off is at most 7 times what remains, and usually none of it.

    Args:
      x: any rank; float16, bfloat16, float32 or float64. Sums are float32 (float64 for
        float64 input).
      axis: the feature axis or axes. Every other axis is reduced.
      weights: how often each value counts: 0 for padding, which may hold anything, NaN
        too; 2 for a value that stands for two. Same rank as x, each size equal to x's
        or 1; booleans or real numbers >= 0.
      axis_name: mapped axis or axes to share moments over, as if the shards of all
        devices were concatenated. One collective.
      axis_index_groups: split that axis into groups that share among themselves only.

    Returns:
      Moments per feature; their shape is x's along the feature axes.

    Raises:
      TypeError: x is not floating point, or an axis is not an integer.
      ValueError: an axis is out of range, the weights do not fit x, or the groups are
        not a partition.
    """
    x = jnp.asarray(x)
    layout = make_layout(x.shape, axis)
    weights = check_weights(x, weights)
    groups = collectives.check_groups(axis_name, axis_index_groups)
    return shared_moments(x, layout, weights, axis_name, groups)


def merge_moments(*parts: Moments) -> Moments:
    """Moments of the union of disjoint sets of values, from the moments of each.

    Exact for uneven and for empty parts, and free of cancellation: the variance is
    that within the parts plus that between their means (Chan, Golub & LeVeque 1979,
    "Updating formulae and a pairwise algorithm").

    Args:
      *parts: moments of one shape each.

    Returns:
      Moments of that shape.

    Raises:
      ValueError: no parts, or parts of different shapes.
    """
    shapes = {np.shape(field) for part in parts for field in part}
    if len(shapes) != 1:
        raise ValueError(
            "merge_moments expects one or more Moments of one shape, got "
            f"{len(parts)} with shapes {sorted(shapes)}."
        )
    stacked = (jnp.stack(field) for field in zip(*parts, strict=True))
    return merge_stacked(Moments(*stacked))


def statistics_dtype(x: jax.Array) -> jnp.dtype:
    """The dtype of sums and statistics: float32, or float64 for float64 input.

    Raises:
      TypeError: x is not floating point.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"x must be floating point, got {x.dtype}; convert it first, for example "
            "x.astype(jnp.float32)."
        )
    return jnp.dtype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


def check_weights(x: jax.Array, weights: jax.Array | None) -> jax.Array | None:
    """Weights in the dtype of the statistics.

    Raises:
      ValueError: their rank is not x's (NumPy would align one weight per example with
        the features, without a word), or a size is neither x's nor 1.
    """
    dtype = statistics_dtype(x)
    if weights is None:
        return None
    weights = jnp.asarray(weights)
    if weights.ndim != x.ndim or any(
        size not in (1, full) for size, full in zip(weights.shape, x.shape, strict=True)
    ):
        one_per_example = x.shape[:1] + (1,) * (x.ndim - 1)
        raise ValueError(
            f"weights of shape {weights.shape} do not fit x of shape {x.shape}; "
            "expected the same rank, each size equal to x's or 1, for example "
            f"{one_per_example} for one weight per example."
        )
    return weights.astype(dtype)


def nonzero_count(count: jax.Array) -> jax.Array:
    """The count to divide by: 1 where there is nothing, and so only zeros to divide."""
    return jnp.where(count == 0, 1, count)


def shared_moments(
    x: jax.Array,
    layout: Layout,
    weights: jax.Array | None,
    axis_name: AxisName | None,
    groups: tuple[tuple[int, ...], ...] | None,
    expected_mean: jax.Array | None = None,
) -> Moments:
    """`moments` for arguments that have been checked.

    An expected mean, (features), that is near the mean spares a TPU a pass over x. The
    moments depend on it by rounding alone, however far off it is.
    """
    from_sample = functools.partial(_from_sample, layout)
    # In checked `jax.shard_map` the forms must vary over the same axes: those of x.
    if expected_mean is None or (
        collectives.varying_axes(expected_mean) - collectives.varying_axes(x)
    ):
        mean, var = from_sample(x, weights)
    else:
        mean, var = by_platform(
            *(x, weights, jax.lax.stop_gradient(expected_mean)),
            tpu=functools.partial(_from_expected_mean, layout),
            default=lambda x, weights, _: from_sample(x, weights),
        )
    local = Moments(_total_weight(x, layout, weights), mean, var)
    if axis_name is None:
        return local
    gathered = collectives.gather(jnp.stack(local), axis_name, groups)
    return merge_stacked(Moments(*jnp.moveaxis(gathered, 1, 0)))


def _from_sample(
    layout: Layout, x: jax.Array, weights: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Mean and variance about the mean of a sample, which is always near."""
    if weights is None:
        shift = _sample_mean(layout, x)
    else:
        (shift,) = position_sums(layout, weights * _unmasked(x, weights))
        shift = shift / nonzero_count(_total_weight(x, layout, weights))
    # One bit less: a rounding that no compiler can fuse away. Where it divides by
    # multiplying, it would add the correction to a shift that was never rounded, and
    # that the deviations were not taken from.
    finfo = jnp.finfo(shift.dtype)
    shift = jax.lax.reduce_precision(shift, finfo.nexp, finfo.nmant - 1)
    (shift,) = computed_once(jax.lax.stop_gradient(shift))
    mean, var, _ = _moments_about(shift, layout, x, weights)
    return mean, var


def _from_expected_mean(
    layout: Layout, x: jax.Array, weights: jax.Array | None, expected_mean: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Mean and variance about the expected mean, or a sample's where that was far off.

    On TPU XLA fuses the sums into the convolution that computes x, if they need nothing
    else of x. The other branch is not computed as long as it is not taken.
    """
    expected_mean = expected_mean.astype(statistics_dtype(x))
    mean, var, near = _moments_about(expected_mean, layout, x, weights)
    # Of no values there is no mean, whatever was expected.
    mean = jnp.where(_total_weight(x, layout, weights) == 0, 0, mean)
    return jax.lax.cond(
        jnp.all(near), lambda: (mean, var), lambda: _from_sample(layout, x, weights)
    )


def _moments_about(
    shift: jax.Array, layout: Layout, x: jax.Array, weights: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mean and variance from deviations from a shift, and whether that was near.

    It was if what cancels in the variance is at most 7 times what remains.
    """
    total = _total_weight(x, layout, weights)
    deviation = _unmasked(x, weights) - layout.expand(shift)
    weighted = deviation if weights is None else weights * deviation
    sums = position_sums(layout, weighted, weighted * deviation)
    correction, square = (value / nonzero_count(total) for value in sums)
    off = correction * correction
    near = jnp.isfinite(square) & (off <= (1 - 1 / SAMPLING) * square)
    return shift + correction, jnp.maximum(square - off, 0), near


def _unmasked(x: jax.Array, weights: jax.Array | None) -> jax.Array:
    """The input in the dtype of the sums, with 0 for padding, whatever that holds."""
    x = x.astype(statistics_dtype(x))
    return x if weights is None else jnp.where(weights == 0, 0, x)


def _sample_mean(layout: Layout, x: jax.Array) -> jax.Array:
    """The mean of one position in eight, or a few more; of all if they are few."""
    dtype = statistics_dtype(x)
    if layout.num_positions <= SAMPLING * MIN_SAMPLE:
        return position_mean(layout, x.astype(dtype))
    return by_platform(
        x,
        cpu=lambda x: position_mean(layout, _first_positions(layout, x).astype(dtype)),
        default=lambda x: position_mean(layout, _each_eighth(layout, x).astype(dtype)),
    )


def _first_positions(layout: Layout, x: jax.Array) -> jax.Array:
    """The first examples, which lie next to each other: the fastest to read on CPU."""
    axis = layout.position_axes[0]
    return jax.lax.slice_in_dim(x, 0, math.ceil(x.shape[axis] / SAMPLING), axis=axis)


def _each_eighth(layout: Layout, x: jax.Array) -> jax.Array:
    """Rows of each example, or where each has too few of them, each eighth example.

    Under `jax.jit` over a batch that is divided over devices, the first examples would
    be sent from one of them to the others.
    """
    batch, *others = layout.position_axes
    axis = max(others, key=lambda axis: x.shape[axis], default=batch)
    if x.shape[axis] < SAMPLING // 2:
        axis = batch
    return jax.lax.slice_in_dim(x, 0, None, SAMPLING, axis)


def _total_weight(x: jax.Array, layout: Layout, weights: jax.Array | None) -> jax.Array:
    if weights is None:
        dtype = statistics_dtype(x)
        return jnp.full(layout.feature_shape, layout.num_positions, dtype)
    repeats = math.prod(
        x.shape[axis] for axis in layout.position_axes if weights.shape[axis] == 1
    )
    total = jnp.sum(weights, axis=layout.position_axes) * repeats
    return jnp.broadcast_to(total, layout.feature_shape)


def merge_stacked(parts: Moments) -> Moments:
    """Merges parts that are stacked along a leading axis."""
    total = jnp.sum(parts.count, axis=0, keepdims=True)
    share = parts.count / nonzero_count(total)
    rough_mean = jnp.sum(share * parts.mean, axis=0, keepdims=True)
    correction = jnp.sum(share * (parts.mean - rough_mean), axis=0, keepdims=True)
    mean = jnp.where(total == 0, 0, rough_mean + correction)
    between = jnp.square(parts.mean - mean)
    var = jnp.sum(share * (parts.var + between), axis=0)
    return Moments(count=total[0], mean=mean[0], var=var)
