"""How each platform's compiler wants the passes over memory to be written.

`passes.py` writes each pass once, for a `Form`; here are the three that there are, and
the one place that chooses between them. All forms give the same results up to rounding.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from bn_jax.layout import Layout

Result = TypeVar("Result")

# XLA's CPU compiler unrolls a reduction of so many values, and up to this length also
# vectorises what surrounds it, in networks whose branches are added on the way, too.
MAX_PARTS = 8
# Eigen, which sums from 4096 values on and more accurately than XLA's own loop, must
# get what the parts' sums leave. Smaller arrays are in the cache anyway.
MIN_SIZE = 4096 * MAX_PARTS
# The mean of fewer positions would often be half a standard deviation off. As many rows
# XLA's CPU compiler adds in one unrolled loop: more of them take twice as long.
MIN_SAMPLE = 8


class Form(NamedTuple):
    """What one platform's compiler has to be helped with.

    `sums(layout, *values)` sums several arrays over the positions, in the pass that
    computes them.

    `hoist(table)` keeps the computation of a stack of per-feature arrays out of the
    loops over positions that use them.

    `hide(table)` is one that common-subexpression elimination (CSE) does not recognise,
    so that two passes compute what they have in common twice. For a further pass, hide
    the hidden one: CSE recognises two results for the same array.

    `sample(layout, x)` takes a share of the positions, at least one in 32.

    `expects_mean`: deviations are taken from the mean that is expected, if that turns
    out to be near, so that the moments' sums need nothing of x but x.

    `unit` is what deviations from the mean are multiplied by, a power of two: 0.5 keeps
    them from overflowing.
    """

    sums: Callable[..., list[jax.Array]]
    hoist: Callable[[jax.Array], jax.Array]
    hide: Callable[[jax.Array], jax.Array]
    sample: Callable[[Layout, jax.Array], jax.Array]
    expects_mean: bool
    unit: float


def run(one_pass: Callable[..., Result], *operands: Any) -> Result:
    """Runs a pass in the form of the platform that the program is compiled for.

    Args:
      one_pass: called as one_pass(form, *operands).
      *operands: trees of arrays.

    Returns:
      The pass's result.
    """
    gpu = functools.partial(one_pass, GPU)
    # The CPU's form is the default, for platforms that are not named here.
    result: Result = lax.platform_dependent(
        *operands,
        default=functools.partial(one_pass, CPU),
        cuda=gpu,
        rocm=gpu,
        tpu=functools.partial(one_pass, TPU),
    )
    return result


def _unchanged(table: jax.Array) -> jax.Array:
    return table


def _barrier(table: jax.Array) -> jax.Array:
    result: jax.Array = lax.optimization_barrier(table)
    return result


def _differentiable(sums: Callable[..., list[jax.Array]]) -> Callable[..., Any]:
    """Gives sums the tangents that `lax.reduce` of several arrays does not have."""
    with_tangents = jax.custom_jvp(sums, nondiff_argnums=(0,))

    @with_tangents.defjvp
    def tangents(
        layout: Layout, primals: Sequence[jax.Array], tangents: Sequence[jax.Array]
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        return with_tangents(layout, *primals), _plain_sums(layout, *tangents)

    return with_tangents


def _plain_sums(layout: Layout, *values: jax.Array) -> list[jax.Array]:
    return [jnp.sum(value, axis=layout.position_axes) for value in values]


def _sums_in_one_reduction(layout: Layout, *values: jax.Array) -> list[jax.Array]:
    return _reduce(values, layout.position_axes)


def _sums_of_parts(layout: Layout, *values: jax.Array) -> list[jax.Array]:
    """Sums parts of the positions in one reduction, then the parts' sums plainly."""
    shape = values[0].shape
    # Along the last axis nothing would be left within a part to vectorise.
    axes = [axis for axis in layout.position_axes if axis < len(shape) - 1]
    if not axes or _is_less(values[0].size, MIN_SIZE):
        return _plain_sums(layout, *values)
    axis = max(axes, key=lambda axis: _num_parts(shape[axis]))
    parts = _num_parts(shape[axis])
    split = (*shape[:axis], shape[axis] // parts, parts, *shape[axis + 1 :])
    partial_sums = _reduce([value.reshape(split) for value in values], (axis + 1,))
    return _plain_sums(layout, *partial_sums)


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


def _is_less(size: int, limit: int) -> bool:
    """Whether a size is known to be less; a symbolic one, of an export, is not."""
    return isinstance(size, int) and size < limit


def _first_examples(layout: Layout, x: jax.Array) -> jax.Array:
    """The first of the examples, or of their rows if the examples are few."""
    every = _one_in(8, layout)
    long = (a for a in layout.position_axes if not _is_less(x.shape[a], every))
    axis = next(long, layout.position_axes[0])
    return lax.slice_in_dim(x, 0, -(-x.shape[axis] // every), axis=axis)


def _strided(every: int, layout: Layout, x: jax.Array) -> jax.Array:
    """Rows of each example, or if each has too few of them, some of the examples.

    Under `jax.jit` over a batch that is divided over devices, the first examples would
    be sent from one device to the others. Every eighth is not, if the number of each
    device's examples divides by 8.
    """
    # A power of two: sizes divide by it.
    every = 1 << (_one_in(every, layout).bit_length() - 1)
    batch, *others = layout.position_axes
    rows = [axis for axis in others if not _is_less(x.shape[axis], every // 2)]
    if not rows:
        return lax.slice_in_dim(x, 0, None, min(every, 8), batch)
    longest = max(
        rows,
        key=lambda axis: x.shape[axis] if isinstance(x.shape[axis], int) else math.inf,
    )
    return lax.slice_in_dim(x, 0, None, every, longest)


def _one_in(every: int, layout: Layout) -> int:
    """The share of the positions that a sample takes: all, if they are few."""
    if not _is_less(layout.num_positions, MIN_SAMPLE * every):
        return every
    return max(1, -(-layout.num_positions // MIN_SAMPLE))


# Plain sums are fast, but Eigen, which computes them, wants each array in memory first.
# So one reduction sums parts of the positions in the loop that computes the values, and
# Eigen gets only its short results. XLA does not move a concatenation into a loop,
# but would take it apart if no barrier kept it, and compute 1 / sqrt(var + eps) and the
# like for every position. The first examples lie next to each other, and
# are the fastest to read. Each loop computes what it needs again without being asked.
CPU = Form(
    sums=_differentiable(_sums_of_parts),
    hoist=_barrier,
    hide=_unchanged,
    sample=_first_examples,
    expects_mean=False,
    unit=0.5,
)

# XLA fuses plain sums, too, but ends each in a kernel of its own. What several passes
# compute alike it stores, ReLU's mask even from the forward pass to the backward one,
# unless CSE does not see it. A sample of every 32nd row is a hundredth of what the
# forward pass reads and writes.
GPU = Form(
    sums=_differentiable(_sums_in_one_reduction),
    hoist=_unchanged,
    hide=_barrier,
    sample=functools.partial(_strided, 32),
    expects_mean=False,
    unit=0.5,
)

# XLA fuses everything into the convolutions around it, and best what is plain. But a
# sum that needs a shift taken from x itself cannot be fused into the convolution that
# computes x. A multiplication is an instruction of its own.
TPU = Form(
    sums=_plain_sums,
    hoist=_unchanged,
    hide=_unchanged,
    sample=functools.partial(_strided, 8),
    expects_mean=True,
    unit=1.0,
)
