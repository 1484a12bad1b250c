"""One training step over devices, by each way of mapping that JAX has."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from bn_jax import BatchNormParams, BatchStats, batch_norm
from tests.bn_jax.reference import Problem, Step, as_step

# "cast" is shard_map's checked mode with parameters cast to one copy per device.
MODES = ("pmap", "vmap", "unchecked", "checked", "cast")
MODES_WITH_GROUPS = ("pmap", "unchecked", "checked", "cast")

PerDevice = Callable[..., Any]


def device_mesh(*shape: int) -> Mesh:
    """A mesh of the first devices, with axes named a, b, ..."""
    devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
    return Mesh(devices, tuple("abc"[: len(shape)]))


def map_devices(
    mode: str, function: PerDevice, num_devices: int, replicated: int = 1
) -> PerDevice:
    """Maps function over axis "a"; its first `replicated` arguments are not split.

    All other arguments, and all results, have a leading axis of the devices.
    """
    if mode in ("pmap", "vmap"):
        over = jax.pmap if mode == "pmap" else jax.vmap

        @functools.cache
        def with_arguments(number: int) -> PerDevice:
            in_axes = (None,) * replicated + (0,) * (number - replicated)
            mapped = over(function, axis_name="a", in_axes=in_axes)
            return mapped if mode == "pmap" else jax.jit(mapped)

        return lambda *args: with_arguments(len(args))(*args)

    def one_device(*args: Any) -> Any:
        shared = args[:replicated]
        if mode == "cast":
            shared = jax.lax.pcast(shared, "a", to="varying")
        own = jax.tree.map(lambda leaf: leaf[0], args[replicated:])
        return jax.tree.map(lambda leaf: leaf[None], function(*shared, *own))

    def sharded(*args: Any) -> Any:
        split = PartitionSpec("a")
        specs = (PartitionSpec(),) * replicated
        specs += (split,) * (len(args) - replicated)
        return jax.shard_map(
            one_device,
            mesh=device_mesh(num_devices),
            in_specs=specs,
            out_specs=split,
            check_vma=mode != "unchecked",
        )(*args)

    return jax.jit(sharded)


def step_on_device(**options: Any) -> PerDevice:
    """A training step with gradients, as each device runs it."""

    def step(
        params: BatchNormParams,
        stats: BatchStats,
        x: jax.Array,
        dy: jax.Array,
        weights: jax.Array | None = None,
    ) -> Step:
        def forward(
            params: BatchNormParams, x: jax.Array
        ) -> tuple[jax.Array, BatchStats]:
            return batch_norm(params, stats, x, train=True, weights=weights, **options)

        y, pullback, new_stats = jax.vjp(forward, params, x, has_aux=True)
        return as_step(y, new_stats, pullback(dy))

    return step


@functools.cache
def _mapped_step(mode: str, num_devices: int, options: tuple[Any, ...]) -> PerDevice:
    step = step_on_device(**dict(options))
    return map_devices(mode, step, num_devices, replicated=2)


def shared_step(
    mode: str,
    problem: Problem,
    num_devices: int,
    weights: np.ndarray | None = None,
    **options: Any,
) -> Step:
    """A step on x split over devices, put together as if one device had done it.

    The statistics keep their leading axis of devices.
    """

    def split(array: np.ndarray) -> jax.Array:
        return jnp.asarray(array).reshape(num_devices, -1, *np.shape(array)[1:])

    args = [split(a) for a in (problem.x, problem.dy, weights) if a is not None]
    options = {"axis_name": "a"} | options
    mapped = _mapped_step(mode, num_devices, tuple(options.items()))
    step = mapped(*problem[:2], *args)
    step = Step(*(np.asarray(field) for field in step))
    # Each device holds its own rows' contribution; in the checked mode, parameters that
    # are known to be replicated hold the sum already.
    if mode == "checked":
        dscale, dbias = step.dscale[0], step.dbias[0]
    else:
        dscale, dbias = step.dscale.sum(0), step.dbias.sum(0)
    return step._replace(
        y=step.y.reshape(np.shape(problem.x)),
        dx=step.dx.reshape(np.shape(problem.x)),
        dscale=dscale,
        dbias=dbias,
    )
