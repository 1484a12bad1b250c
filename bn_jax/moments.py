"""Count, mean and variance of a batch, and merging them exactly over its parts."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from bn_jax import collectives, forms
from bn_jax.collectives import AxisIndexGroups, AxisName, Groups
from bn_jax.layout import Layout, make_layout
from bn_jax.passes import (
    moments_pass,
    nonzero,
    overflowed,
    saturated,
    statistics_dtype,
    total_weight,
)
from bn_jax.sharding import compiled, spec_along


class Moments(NamedTuple):
    """First and second moments of a set of values, per feature.

    A count travels with the moments so that those of any parts, however uneven, merge
    exactly.
    """

    # All (features), float32 or float64. `count` is the number of values, or their
    # total weight; the checker minds that the name hides tuple.count.
    count: jax.Array  # type: ignore[assignment]
    mean: jax.Array  # 0 where count is 0
    var: jax.Array  # biased: sum((x - mean)^2) / count; at most the largest finite


def moments(
    x: ArrayLike,
    *,
    axis: int | Sequence[int] = -1,
    weights: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: AxisIndexGroups | None = None,
) -> Moments:
    """Mean and biased variance over all positions (Algorithm 1, lines 1 and 2).

    One pass over deviations from a shift, whose own mean then corrects mean and
    variance. The shift is the mean of a share f of the positions: an eighth, on GPU one
    in 32, or with weights, some of which may be 0, all.

    Next to nothing cancels, however far the mean is from zero and however the values
    are ordered: the variance between that share and the rest is
    f / (1 - f) * (shift - mean)^2 and cannot exceed the whole variance, so the square
    that is taken off is at most 7 (31) times what remains, and usually none of it.

    Args:
      x: any rank; float16, bfloat16, float32 or float64. Sums are float32 (float64 for
        float64 input).
      axis: the feature axis or axes. Every other axis is reduced.
      weights: how often each value counts: 0 for padding, which may hold anything, NaN
        too; 2 for a value that stands for two. Same rank as x, each size equal to x's
        or 1; booleans or real numbers >= 0.
      axis_name: mapped axis or axes to share moments over, as if the shards of all
        devices were concatenated. One collective among up to 8 devices, else two,
        whose size does not grow with the devices. Every device gets the same bits.
      axis_index_groups: split that axis into groups that share among themselves only.

    Returns:
      Moments per feature; their shape is x's along the feature axes. Finite if x is.

    Raises:
      TypeError: x is not floating point, or an axis is not an integer.
      ValueError: an axis is out of range, the weights do not fit x, or the groups are
        not a partition.
    """
    x = jnp.asarray(x)
    layout = make_layout(x.shape, axis)
    checked = check_weights(x, weights)
    groups = collectives.check_groups(axis_name, axis_index_groups)
    options = _Options(layout.feature_axes, axis_name, groups)
    result: Moments = _moments(options, x, checked)
    return result


class _Options(NamedTuple):
    feature_axes: tuple[int, ...]
    axis_name: AxisName | None
    groups: Groups | None


def _like_features(options: _Options, x: jax.Array, _: Any) -> Any:
    spec: Any = spec_along(x, options.feature_axes)
    return Moments(spec, spec, spec)


@compiled(_like_features)
def _moments(options: _Options, x: jax.Array, weights: jax.Array | None) -> Moments:
    layout = make_layout(x.shape, options.feature_axes)
    return shared_moments(layout, x, weights, options.axis_name, options.groups)


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


def check_weights(x: jax.Array, weights: ArrayLike | None) -> jax.Array | None:
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


def shared_moments(
    layout: Layout,
    x: jax.Array,
    weights: jax.Array | None,
    axis_name: AxisName | None,
    groups: Groups | None,
    expected_mean: jax.Array | None = None,
) -> Moments:
    """`moments` for arguments that have been checked.

    An expected mean, (features), that is near the mean spares a TPU a pass over x. The
    moments depend on it by rounding alone, however far off it is.
    """
    if expected_mean is not None:
        expected_mean = jax.lax.stop_gradient(expected_mean)
        # In checked `jax.shard_map` all forms' results must vary over the same axes.
        if collectives.varying_axes(expected_mean) - collectives.varying_axes(x):
            expected_mean = None

    def one_pass(form: forms.Form, *operands: Any) -> tuple[jax.Array, jax.Array]:
        return moments_pass(form, layout, *operands)

    mean, var = forms.run(one_pass, x, weights, expected_mean)
    local = Moments(total_weight(layout, x, weights), mean, var)
    return share(local, axis_name, groups)


def share(local: Moments, axis_name: AxisName | None, groups: Groups | None) -> Moments:
    """Merges the moments of devices, each of which gets the same bits."""
    if axis_name is None:
        return local
    if collectives.group_size(axis_name, groups) <= collectives.MAX_GATHERED:
        gathered = collectives.gather(jnp.stack(local), axis_name, groups)
        return merge_stacked(Moments(*jnp.moveaxis(gathered, 1, 0)))
    # First a mean that is rounded, but the same everywhere; then the devices' means and
    # squares about that one, where nothing cancels. The power of two keeps sums of
    # means from overflowing, and what it rounds away is below 1e-18.
    scale = 2.0**-64
    count, mean, var = local

    def group_sum(*values: jax.Array) -> jax.Array:
        return collectives.group_sum(jnp.stack(values), axis_name, groups)

    total, weighted = group_sum(count, count * (mean * scale))
    divisor = nonzero(total)
    rough_mean = weighted / divisor / scale
    off = jnp.where(count == 0, 0, mean - rough_mean)
    sums = group_sum(count * (off * scale), count * saturated(var + jnp.square(off)))
    correction = sums[0] / divisor / scale
    mean = jnp.where(total == 0, 0, rough_mean + correction)
    square = saturated(sums[1] / divisor)
    var = jnp.maximum(square - jnp.square(correction), 0)
    return Moments(total, mean, jnp.where(overflowed(square), square, var))


def merge_stacked(parts: Moments) -> Moments:
    """Merges parts that are stacked along a leading axis."""
    total = jnp.sum(parts.count, axis=0, keepdims=True)
    share = parts.count / nonzero(total)
    rough_mean = jnp.sum(share * parts.mean, axis=0, keepdims=True)
    correction = jnp.sum(share * (parts.mean - rough_mean), axis=0, keepdims=True)
    mean = jnp.where(total == 0, 0, rough_mean + correction)
    # Of an empty part not even infinity counts, which 0 times would be NaN.
    off = jnp.where(share == 0, 0, parts.mean - mean)
    var = saturated(jnp.sum(share * saturated(parts.var + jnp.square(off)), axis=0))
    return Moments(count=total[0], mean=mean[0], var=var)
