"""Mapping a per-device function over the local devices."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

DEVICE_AXIS = "devices"


class DeviceError(ValueError):
    """Work cannot be divided over the devices as asked."""


def map_over_devices(
    function: Callable[..., Any],
    in_axes: tuple[int | None, ...],
    donate_argnums: tuple[int, ...] = (),
) -> Callable[..., Any]:
    """Maps a function that knows its axis as `DEVICE_AXIS` over the local devices.

    Args:
      function: computes on one device; its results must be the same on all, which
        collectives over `DEVICE_AXIS` see to.
      in_axes: for each argument 0, if it is sharded along a leading device axis, or
        None, if all devices have the whole of it.
      donate_argnums: arguments whose memory the results may take.

    Returns:
      The mapped function. Its results have no device axis and are replicated, so that
      they can be arguments of the next call as they are.
    """
    mapped: Callable[..., Any] = jax.pmap(
        function,
        axis_name=DEVICE_AXIS,
        in_axes=in_axes,
        out_axes=None,
        devices=jax.local_devices(),
        donate_argnums=donate_argnums,
    )
    return mapped


def replicate(tree: Any) -> Any:
    """Puts a copy of every array on all local devices."""
    mesh = Mesh(np.array(jax.local_devices()), (DEVICE_AXIS,))
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def check_divisible(batch_size: int, key: str = "batch_size") -> None:
    """Checks that a batch can be shared out evenly.

    Args:
      batch_size: examples over all devices.
      key: what the configuration calls it.

    Raises:
      DeviceError: the batch size is no multiple of the number of local devices.
    """
    devices = jax.local_device_count()
    if batch_size % devices:
        raise DeviceError(
            f"{key}={batch_size} does not divide over {devices} devices; use a "
            f"multiple of {devices}, for example "
            f"--config.{key}={max(1, round(batch_size / devices)) * devices}."
        )


def shard(array: jax.Array | np.ndarray, axis: int) -> np.ndarray:
    """Splits one axis over the devices: their axis comes first.

    Args:
      array: any shape; its size along `axis` is a multiple of the devices.
      axis: not negative.

    Returns:
      Shape (devices,) + the array's shape, with the size along `axis` divided.
    """
    devices = jax.local_device_count()
    shape = (*array.shape[:axis], devices, -1, *array.shape[axis + 1 :])
    return np.moveaxis(np.asarray(array).reshape(shape), axis, 0)
