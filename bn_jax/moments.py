"""Count, mean and variance of a batch, and merging them exactly over its parts."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bn_jax import collectives
from bn_jax.collectives import AxisIndexGroups, AxisName
from bn_jax.layout import Layout, make_layout


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

    Two passes: the mean first, then deviations from it, whose own mean corrects the
    rounding of the first pass (Chan, Golub & LeVeque 1983, "Algorithms for computing
    the sample variance", the corrected two-pass form). Nothing cancels, however far
    the mean is from zero.

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
    return _merge_stacked(Moments(*stacked))


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
) -> Moments:
    """`moments` for arguments that have been checked."""
    local = _local_moments(x, layout, weights)
    if axis_name is None:
        return local
    gathered = collectives.gather(jnp.stack(local), axis_name, groups)
    return _merge_stacked(Moments(*jnp.moveaxis(gathered, 1, 0)))


def _local_moments(x: jax.Array, layout: Layout, weights: jax.Array | None) -> Moments:
    x = x.astype(statistics_dtype(x))
    if weights is None:
        total = jnp.full(layout.feature_shape, layout.num_positions, x.dtype)
    else:
        x = jnp.where(weights == 0, 0, x)
        total = _weighted_sum(jnp.ones((), x.dtype), layout, weights, x.shape)
    divisor = nonzero_count(total)
    rough_mean = _weighted_sum(x, layout, weights, x.shape) / divisor
    # One bit less: a rounding that no compiler can fuse away. Where it divides by
    # multiplying, it would add the correction to a mean that was never rounded, and
    # that the deviations were not taken from.
    finfo = jnp.finfo(x.dtype)
    rough_mean = jax.lax.reduce_precision(rough_mean, finfo.nexp, finfo.nmant - 1)
    deviation = x - layout.expand(rough_mean)
    correction = _weighted_sum(deviation, layout, weights, x.shape) / divisor
    square = _weighted_sum(deviation * deviation, layout, weights, x.shape) / divisor
    return Moments(
        count=total,
        mean=rough_mean + correction,
        var=jnp.maximum(square - correction * correction, 0),
    )


def _weighted_sum(
    values: jax.Array, layout: Layout, weights: jax.Array | None, shape: tuple[int, ...]
) -> jax.Array:
    if weights is not None:
        values = weights * values
    return jnp.sum(jnp.broadcast_to(values, shape), axis=layout.position_axes)


def _merge_stacked(parts: Moments) -> Moments:
    """Merges parts that are stacked along a leading axis."""
    total = jnp.sum(parts.count, axis=0, keepdims=True)
    share = parts.count / nonzero_count(total)
    rough_mean = jnp.sum(share * parts.mean, axis=0, keepdims=True)
    correction = jnp.sum(share * (parts.mean - rough_mean), axis=0, keepdims=True)
    mean = jnp.where(total == 0, 0, rough_mean + correction)
    between = jnp.square(parts.mean - mean)
    var = jnp.sum(share * (parts.var + between), axis=0)
    return Moments(count=total[0], mean=mean[0], var=var)
