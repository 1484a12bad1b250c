import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.parallel import (
    DEVICE_AXIS,
    DeviceError,
    check_divisible,
    map_over_devices,
    replicate,
    shard,
)


def test_eight_devices():
    assert jax.local_device_count() == 8


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_shard_splits_one_axis_in_order(axis):
    shape = [3, 5, 7]
    shape[axis] = 16
    array = np.arange(np.prod(shape)).reshape(shape)
    shards = shard(jnp.asarray(array), axis)
    assert shards.shape == (8, *shape[:axis], 2, *shape[axis + 1 :])
    np.testing.assert_array_equal(np.concatenate(list(shards), axis), array)


def test_replicate_puts_everything_everywhere():
    tree = {"a": np.arange(3), "b": (jnp.float32(2),)}
    for array, expected in zip(
        jax.tree.leaves(replicate(tree)), jax.tree.leaves(tree), strict=True
    ):
        assert array.sharding.is_fully_replicated
        assert array.devices() == set(jax.local_devices())
        np.testing.assert_array_equal(array, expected)


def test_mapped_function_shares_along_its_axis():
    def function(weight, share):
        total = jax.lax.psum(weight * jnp.sum(share), DEVICE_AXIS)
        return total, jax.lax.psum(1, DEVICE_AXIS)

    mapped = map_over_devices(function, in_axes=(None, 0))
    numbers = np.arange(24.0, dtype=np.float32)
    total, devices = mapped(replicate(np.float32(2)), shard(numbers, 0))
    assert total.shape == devices.shape == ()
    assert total == 2 * numbers.sum()
    assert devices == 8
    assert mapped(total, shard(numbers, 0))[0] == total * numbers.sum()


def test_donated_arguments_are_gone():
    def function(x, share):
        return x + jax.lax.psum(share, DEVICE_AXIS)

    mapped = map_over_devices(function, in_axes=(None, 0), donate_argnums=(0,))
    x = replicate(np.zeros(5, np.float32))
    found = mapped(x, np.ones((8, 5), np.float32))
    np.testing.assert_array_equal(found, np.full(5, 8))
    assert x.is_deleted()


@pytest.mark.parametrize(("batch_size", "example"), [(60, 64), (4, 8), (67, 64)])
def test_batch_that_does_not_divide(batch_size, example):
    check_divisible(example)
    with pytest.raises(
        DeviceError,
        match=f"batch_size={batch_size} .* 8 devices.*--config.batch_size={example}",
    ):
        check_divisible(batch_size)
