"""Fewer passes over memory: what XLA computes in one loop, once, or again.

CPU and GPU need help, each in its own way. On TPU XLA fuses the plain form best, into
the convolutions around it.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from bn_jax.layout import Layout
from bn_jax.platforms import by_platform

# As many parts are added in one loop. XLA unrolls it, and up to this length vectorises
# what surrounds it, also where a network's branches are summed on the way.
MAX_PARTS = 8
# The library sums arrays from 4096 elements, more accurately than XLA's own loop, and
# must get those that the parts' sums leave. What is smaller is in the cache anyway.
MIN_SIZE = 4096 * MAX_PARTS


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def position_sums(layout: Layout, *values: jax.Array) -> list[jax.Array]:
    """Sums several arrays over the positions, in the pass that computes them.

    Plain sums of computed arrays are fast on CPU, but each array is written to memory
    first, for a library to add up. So one reduction of all of them adds up parts of the
    positions in the loop that computes the values, and the library gets only its short
    results. On GPU it adds up all positions: XLA fuses plain sums as well, but ends
    each of them in a kernel of its own.

    Args:
      layout: that of the values.
      *values: of one shape and dtype.

    Returns:
      As many sums, (features) each, in that dtype.
    """
    return by_platform(
        *values,
        cpu=functools.partial(_sum_parts, layout),
        gpu=functools.partial(_sum_together, layout),
        default=functools.partial(_sum, layout),
    )


@position_sums.defjvp
def _position_sums_jvp(
    layout: Layout, primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]
) -> tuple[list[jax.Array], list[jax.Array]]:
    return position_sums(layout, *primals), _sum(layout, *tangents)


def position_mean(layout: Layout, value: jax.Array) -> jax.Array:
    """The mean over the positions, to be rounded or converted and no more.

    On GPU each value is divided before it is summed: the sum and what follows it are
    then one kernel.

    Args:
      layout: that of the value, but for the number of positions.
      value: of any number of positions.

    Returns:
      The mean, (features); 0 of no positions.
    """
    num_positions = value.size // max(math.prod(layout.feature_shape), 1)
    divisor = max(num_positions, 1)
    return by_platform(
        value,
        gpu=lambda value: _sum(layout, value / divisor)[0],
        default=lambda value: position_sums(layout, value)[0] / divisor,
    )


def computed_once(*per_feature: jax.Array) -> list[jax.Array]:
    """Keeps the computation of per-feature arrays out of the loops that use them.

    On CPU XLA would repeat it for every position. Nothing is gained for one array that
    is used only once.

    Args:
      *per_feature: of one shape and dtype.

    Returns:
      The arrays.
    """
    # XLA does not move a concatenation that is used in several places into a loop. (One
    # array alone would be none.) The barrier keeps it from taking it apart again.
    table = jnp.stack([*per_feature, per_feature[0]])
    table = by_platform(
        table, cpu=lax.optimization_barrier, default=lambda table: table
    )
    return list(table[:-1])


def computed_again(*per_feature: jax.Array) -> list[jax.Array]:
    """Arrays that XLA does not recognise, so that it computes what they yield anew.

    On GPU a large array that two passes over memory compute alike would be computed
    once, written and read twice; ReLU's mask even from the forward pass to the backward
    one. On CPU and TPU each loop computes its own as it is.

    Args:
      *per_feature: of any shape and dtype. For a third pass give those of the second:
        XLA recognises two results for the same arrays.

    Returns:
      The arrays.
    """
    return by_platform(*per_feature, gpu=_hidden, default=lambda *arrays: list(arrays))


def _hidden(*arrays: jax.Array) -> list[jax.Array]:
    return list(lax.optimization_barrier(arrays))


def _sum(layout: Layout, *values: jax.Array) -> list[jax.Array]:
    return [jnp.sum(value, axis=layout.position_axes) for value in values]


def _sum_parts(layout: Layout, *values: jax.Array) -> list[jax.Array]:
    shape = values[0].shape
    # Along the last axis there is nothing left to vectorise within a part.
    axes = [axis for axis in layout.position_axes if axis < len(shape) - 1]
    if not axes or values[0].size < MIN_SIZE:
        return _sum(layout, *values)
    axis = max(axes, key=lambda axis: _num_parts(shape[axis]))
    parts = _num_parts(shape[axis])
    split = (*shape[:axis], shape[axis] // parts, parts, *shape[axis + 1 :])
    partial_sums = _reduce([value.reshape(split) for value in values], (axis + 1,))
    return _sum(layout, *partial_sums)


def _sum_together(layout: Layout, *values: jax.Array) -> list[jax.Array]:
    return _reduce(values, layout.position_axes)


def _reduce(values: Sequence[jax.Array], axes: Sequence[int]) -> list[jax.Array]:
    """Sums as one reduction of several arrays."""
    zero = jnp.zeros((), values[0].dtype)
    sums = lax.reduce(
        tuple(values),
        (zero,) * len(values),
        lambda left, right: tuple(map(jnp.add, left, right)),
        axes,
    )
    return list(sums)


def _num_parts(size: int) -> int:
    return max(parts for parts in range(1, MAX_PARTS + 1) if size % parts == 0)
