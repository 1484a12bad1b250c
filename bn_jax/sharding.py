"""Explicit shardings, and jit: how every public function runs what it computes.

In a mesh of explicit axes, `jax.make_mesh`'s default, JAX asks what a sharding becomes
wherever that is not plain from one operation. Here only the results' shardings matter:
those of the input and of the old statistics. So what lies between is left to the
compiler, as in a mesh of automatic axes.
"""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def compiled(results_like: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates function(options, *operands), whose options are hashable.

    The function is compiled once for each options and shapes, also if it is called
    eagerly.

    Args:
      results_like: called as the function; returns partition specs in the structure of
        its result. Asked in meshes of explicit axes alone.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(options: Hashable, *operands: Any) -> Any:
            bound = functools.partial(function, options)
            meshes = (jax.typeof(x).sharding.mesh for x in jax.tree.leaves(operands))
            mesh = next(filter(_explicit_axes, meshes), None)
            if mesh is None:
                return bound(*operands)
            automatic = jax.sharding.auto_axes(
                bound,
                axes=_explicit_axes(mesh),
                out_sharding=jax.tree.map(
                    functools.partial(NamedSharding, mesh),
                    results_like(options, *operands),
                ),
            )
            return automatic(*operands)

        named = functools.wraps(function)(call)
        return jax.jit(named, static_argnums=0, inline=True)

    return decorate


def specs_of(tree: Any) -> Any:
    """How a tree's arrays are divided."""
    return jax.tree.map(lambda leaf: jax.typeof(leaf).sharding.spec, tree)


def spec_along(x: jax.Array, axes: Sequence[int]) -> PartitionSpec:
    """How an array is divided that has some of x's axes alone."""
    spec = jax.typeof(x).sharding.spec
    return PartitionSpec(*(spec[axis] for axis in axes))


def divided_like(value: jax.Array, like: jax.Array) -> jax.Array:
    """The value, divided as another array is, in a mesh of explicit axes."""
    sharding = jax.typeof(like).sharding
    if not _explicit_axes(sharding.mesh) or jax.typeof(value).sharding == sharding:
        return value
    result: jax.Array = jax.sharding.reshard(value, sharding)
    return result


def _explicit_axes(mesh: Any) -> tuple[str, ...]:
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in kinds if kind == AxisType.Explicit)
