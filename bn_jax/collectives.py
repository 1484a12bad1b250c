"""Sharing small per-feature arrays over mapped axes, one collective at a time.

A mapped axis is one that `jax.pmap`, `jax.shard_map` or `jax.vmap` has given a name.
"""

from collections.abc import Hashable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

AxisName = Hashable | tuple[Hashable, ...]
AxisIndexGroups = Sequence[Sequence[int]]
Groups = tuple[tuple[int, ...], ...]  # checked and hashable

# Up to so many devices may receive all the others' numbers: one collective in place of
# two, whose latency counts more than its size.
MAX_GATHERED = 8


def check_groups(
    axis_name: AxisName | None, groups: AxisIndexGroups | None
) -> Groups | None:
    """Checks device groups and makes them hashable.

    Args:
      axis_name: the mapped axis that the groups split.
      groups: lists of indices along that axis, or None for one group of all.

    Returns:
      The groups as nested tuples, or None.

    Raises:
      ValueError: there is no axis to split, or the groups are not a partition of it
        into parts of one size.
    """
    if groups is None:
        return None
    if axis_name is None:
        raise ValueError(
            "axis_index_groups was given without axis_name; name the mapped axis that "
            "the groups split."
        )
    groups = tuple(tuple(int(i) for i in group) for group in groups)
    size = lax.axis_size(axis_name)
    if sorted(i for group in groups for i in group) != list(range(size)):
        raise ValueError(
            f"axis_index_groups={groups} must hold each index from 0 to {size - 1} of "
            f"axis {axis_name!r} exactly once."
        )
    if len({len(group) for group in groups}) != 1:
        raise ValueError(
            f"axis_index_groups={groups} must be groups of one size, got sizes "
            f"{[len(group) for group in groups]}."
        )
    return groups


def group_size(axis_name: AxisName | None, groups: Groups | None) -> int:
    """The number of devices that share moments: 1 without a mapped axis."""
    if axis_name is None:
        return 1
    return lax.axis_size(axis_name) if groups is None else len(groups[0])


def gather(value: jax.Array, axis_name: AxisName, groups: Groups | None) -> jax.Array:
    """Stacks every device's value along a new leading axis, in one collective.

    Without groups each device adds its value into a slot of its own, since `lax.psum`
    alone takes several axes of any kind and yields a result that `jax.shard_map`'s
    check knows to be the same on all devices. With groups, `lax.all_gather` alone
    takes them in both of `jax.shard_map`'s modes.

    Args:
      value: any shape; small, since every device receives all of them.
      axis_name: the mapped axis or axes.
      groups: as `check_groups` returns them.

    Returns:
      Shape (devices in the group,) + value.shape, in the order of the axis or group.
    """
    if groups is not None:
        return lax.all_gather(value, axis_name, axis_index_groups=groups)
    slot = lax.axis_index(axis_name)
    own_slot = jnp.arange(lax.axis_size(axis_name), dtype=slot.dtype) == slot
    # A select, not a product: a NaN must stay in its device's slot.
    slots = jnp.where(jnp.expand_dims(own_slot, range(1, 1 + value.ndim)), value, 0)
    return lax.psum(slots, axis_name)


def group_sum(
    value: jax.Array, axis_name: AxisName | None, groups: Groups | None
) -> jax.Array:
    """Sums over the devices that share moments, the same bits on each of them.

    One collective; within groups of more than `MAX_GATHERED` two, of which the first
    leaves each device with the sum of a share of the numbers: `lax.psum` takes no
    groups in `jax.shard_map`'s checked mode.
    """
    if axis_name is None:
        return value
    if groups is None:
        return lax.psum(value, axis_name)
    size = len(groups[0])
    if size <= MAX_GATHERED:
        return gather(value, axis_name, groups).sum(0)
    flat = value.reshape(-1)
    padded = jnp.pad(flat, (0, -flat.size % size))
    share = lax.psum_scatter(padded, axis_name, axis_index_groups=groups, tiled=True)
    total = lax.all_gather(share, axis_name, axis_index_groups=groups, tiled=True)
    return total[: flat.size].reshape(value.shape)


def summed_axes(
    axis_name: AxisName | None, groups: Groups | None
) -> frozenset[Hashable]:
    """The axes that `group_sum` sums over whole: none when it sums within groups."""
    if axis_name is None or groups is not None:
        return frozenset()
    return frozenset(axis_name if isinstance(axis_name, tuple) else (axis_name,))


def varying_axes(value: jax.Array) -> frozenset[Hashable]:
    """The mapped axes over which `jax.shard_map` knows a value to differ.

    Empty under `jax.pmap`, `jax.vmap` and `jax.shard_map(..., check_vma=False)`,
    which do not track this.
    """
    kind = jax.typeof(value)
    # JAX before 0.10 calls it `vma`.
    return frozenset(
        kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying
    )


def match_varying(
    cotangent: jax.Array,
    primal: jax.Array,
    total: jax.Array | None = None,
    total_axes: frozenset[Hashable] = frozenset(),
) -> jax.Array:
    """Gives a cotangent the type that `jax.shard_map`'s check wants for its primal.

    The cotangent of a value that is the same on all devices is the sum of what every
    device contributes; where nothing is tracked, this leaves the cotangent alone and
    the caller of the gradient averages, as everybody does under `jax.pmap`.

    Args:
      cotangent: this device's contribution.
      primal: the value that it belongs to.
      total: the cotangent's sum over `total_axes`, if already at hand: it is used
        rather than summing again.
      total_axes: the axes that `total` is summed over.

    Returns:
      The cotangent, varying over the axes that the primal varies over.
    """
    missing = varying_axes(cotangent) - varying_axes(primal)
    if missing and missing == total_axes and total is not None:
        cotangent = total
    elif missing:
        cotangent = lax.psum(cotangent, tuple(sorted(missing, key=str)))
    return vary_over(cotangent, varying_axes(primal))


def vary_over(value: jax.Array, axes: frozenset[Hashable]) -> jax.Array:
    """Lets a value vary over axes, too, in `jax.shard_map`'s check."""
    extra = tuple(sorted(axes - varying_axes(value), key=str))
    if not extra:
        return value
    if hasattr(lax, "pcast"):
        return lax.pcast(value, extra, to="varying")
    return lax.pvary(value, extra)  # type: ignore[attr-defined]  # JAX 0.7 and 0.8
