"""Mapping a per-device function over all devices of all processes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

DEVICE_AXIS = "devices"
GLOBAL, LOCAL = "global", "local"  # who shares the moments of a batch


class DeviceError(ValueError):
    """Work cannot be divided over the devices as asked."""


def map_over_devices(
    function: Callable[..., Any],
    in_axes: Sequence[int | None],
    donate_argnums: tuple[int, ...] = (),
    parallelism: str = "pmap",
) -> Any:
    """Maps a function that knows its axis as `DEVICE_AXIS` over all devices.

    Args:
      function: computes on one device; its results must be the same on all, which
        collectives over `DEVICE_AXIS` see to.
      in_axes: for each argument 0, if it is sharded along a leading device axis, or
        None, if all devices have the whole of it.
      donate_argnums: arguments whose memory the results may take.
      parallelism: a key of `PARALLELISMS`; the numbers are the same to rounding.

    Returns:
      The mapped function, which every process must call. Of what is sharded it takes
      its process' part, as `shard` makes it. Its results have no device axis and are
      replicated, so that they can be arguments of the next call as they are. It has a
      method `lower`, as jitted functions do.
    """
    return PARALLELISMS[parallelism](function, tuple(in_axes), donate_argnums)


def _pmap(
    function: Callable[..., Any],
    in_axes: tuple[int | None, ...],
    donate_argnums: tuple[int, ...],
) -> Any:
    return jax.pmap(
        function,
        axis_name=DEVICE_AXIS,
        in_axes=in_axes,
        out_axes=None,
        devices=jax.devices(),
        donate_argnums=donate_argnums,
    )


def _shard_map(
    function: Callable[..., Any],
    in_axes: tuple[int | None, ...],
    donate_argnums: tuple[int, ...],
) -> "_OverMesh":
    def on_device(*arguments: Any) -> Any:
        own = [
            argument if axis is None else jax.tree.map(lambda x: x[0], argument)
            for argument, axis in zip(arguments, in_axes, strict=True)
        ]
        return function(*own)

    mapped = jax.shard_map(
        on_device,
        mesh=_mesh(),
        in_specs=tuple(
            PartitionSpec() if axis is None else PartitionSpec(DEVICE_AXIS)
            for axis in in_axes
        ),
        out_specs=PartitionSpec(),
        # The body is pmap's: it averages gradients itself, and a check of replication
        # would have differentiation sum them over the devices before.
        check_vma=False,
    )
    return _OverMesh(jax.jit(mapped, donate_argnums=donate_argnums), in_axes)


class _OverMesh(NamedTuple):
    """A function of whole arrays, called with each process' part of them."""

    jitted: Any
    in_axes: tuple[int | None, ...]

    def __call__(self, *arguments: Any) -> Any:
        return self.jitted(*self._whole(arguments))

    def lower(self, *arguments: Any) -> Any:
        return self.jitted.lower(*self._whole(arguments))

    def _whole(self, arguments: tuple[Any, ...]) -> list[Any]:
        sharding = NamedSharding(_mesh(), PartitionSpec(DEVICE_AXIS))

        def whole(part: Any) -> jax.Array:
            if isinstance(part, jax.Array):  # of `place`
                return part
            return jax.make_array_from_process_local_data(sharding, part)

        return [
            argument if axis is None else jax.tree.map(whole, argument)
            for argument, axis in zip(arguments, self.in_axes, strict=True)
        ]


PARALLELISMS = {"pmap": _pmap, "shard_map": _shard_map}


def _mesh() -> Mesh:
    return Mesh(np.array(jax.devices()), (DEVICE_AXIS,))


def replicate(tree: Any) -> Any:
    """Puts a copy of every array on all devices of all processes.

    Args:
      tree: arrays, the same in every process.
    """
    everywhere = NamedSharding(_mesh(), PartitionSpec())
    if jax.process_count() == 1:
        return jax.device_put(tree, everywhere)

    def put(array: Any) -> jax.Array:
        own = np.asarray(array)
        return jax.make_array_from_callback(own.shape, everywhere, lambda i: own[i])

    return jax.tree.map(put, tree)


def as_global(tree: Any) -> Any:
    """Results of a mapped function as arrays of all processes, which are not copied.

    With several processes, pmap's results know this process' devices alone.
    """
    everywhere = NamedSharding(_mesh(), PartitionSpec())

    def gather(array: jax.Array) -> jax.Array:
        if len(array.sharding.device_set) == jax.device_count():
            return array
        copies = [shard.data for shard in array.addressable_shards]
        return jax.make_array_from_single_device_arrays(array.shape, everywhere, copies)

    return jax.tree.map(gather, tree)


def one_copy(tree: Any) -> Any:
    """Of replicated arrays the copy on this process' first device."""
    return jax.tree.map(lambda array: array.addressable_data(0), tree)


def check_divisible(batch_size: int, key: str = "batch_size") -> None:
    """Checks that a batch can be shared out evenly.

    Args:
      batch_size: examples over all devices.
      key: what the configuration calls it.

    Raises:
      DeviceError: the batch size is no multiple of the number of devices.
    """
    devices = jax.device_count()
    if batch_size % devices:
        raise DeviceError(
            f"{key}={batch_size} does not divide over {devices} devices; use a "
            f"multiple of {devices}, for example "
            f"--config.{key}={max(1, round(batch_size / devices)) * devices}."
        )


def moments_axes(moments: str) -> dict[str, Any]:
    """Arguments of a batch normalisation module for who shares moments.

    Args:
      moments: `GLOBAL`: all devices; `LOCAL`: each device its own, which is how the
        paper's workers, each with a batch, had them; or how many consecutive devices
        share them, as "4".

    Raises:
      DeviceError: it is none of these, or the devices do not divide into such groups.
    """
    if moments == GLOBAL:
        return {"axis_name": DEVICE_AXIS}
    if moments == LOCAL:
        return {"axis_name": None}
    devices = jax.device_count()
    size = int(moments) if str(moments).isdecimal() else 0
    if size < 1 or devices % size:
        raise DeviceError(
            f"--config.moments={moments}: expected {GLOBAL}, {LOCAL}, or a number of "
            f"devices that divides all {devices} of them."
        )
    groups = np.arange(devices).reshape(-1, size).tolist()
    # Tuples, since a module must be hashable.
    return {"axis_name": DEVICE_AXIS, "axis_index_groups": tuple(map(tuple, groups))}


def check_launch(config: Mapping[str, Any]) -> None:
    """Checks how the work is to be shared.

    Raises:
      DeviceError: the batch does not divide over the devices, or moments would be of
        one example alone.
    """
    check_divisible(config["batch_size"])
    axes = moments_axes(config["moments"])
    sharing = 1 if axes["axis_name"] is None else jax.device_count()
    if "axis_index_groups" in axes:
        sharing = len(axes["axis_index_groups"][0])
    if config["batch_size"] // jax.device_count() * sharing < 2:
        raise DeviceError(
            f"--config.moments={config['moments']}: one example alone cannot be "
            "normalised; use a larger batch_size, or let more devices share moments."
        )


def own_part(array: np.ndarray, axis: int) -> np.ndarray:
    """This process' part of an array that every process has whole.

    Args:
      array: any shape; its size along `axis` is a multiple of the processes.
      axis: not negative.
    """
    parts = np.split(array, jax.process_count(), axis)
    return parts[jax.process_index()]


def place(array: np.ndarray) -> Any:
    """Starts copying a batch to the devices, divided over them as `shard` does it.

    Where there are several processes it stays as it is: JAX copies it with the call.
    """
    if jax.process_count() > 1:
        return array
    sharding = NamedSharding(_mesh(), PartitionSpec(DEVICE_AXIS))
    return jax.device_put(shard(array, axis=0), sharding)


def shard(array: jax.Array | np.ndarray, axis: int) -> np.ndarray:
    """Splits one axis over this process' devices: their axis comes first.

    Args:
      array: this process' part, of any shape; its size along `axis` is a multiple of
        its devices.
      axis: not negative.

    Returns:
      Shape (devices,) + the array's shape, with the size along `axis` divided.
    """
    devices = jax.local_device_count()
    shape = (*array.shape[:axis], devices, -1, *array.shape[axis + 1 :])
    return np.moveaxis(np.asarray(array).reshape(shape), axis, 0)
