import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.distributed.parallel import (
    DEVICE_AXIS,
    PARALLELISMS,
    DeviceError,
    as_global,
    check_divisible,
    check_launch,
    map_over_devices,
    moments_axes,
    one_copy,
    own_part,
    place,
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


@pytest.mark.parametrize("parallelism", PARALLELISMS)
def test_mapped_function_shares_along_its_axis(parallelism):
    def function(weight, share):
        total = jax.lax.psum(weight * jnp.sum(share), DEVICE_AXIS)
        return total, jax.lax.psum(1, DEVICE_AXIS)

    mapped = map_over_devices(function, in_axes=(None, 0), parallelism=parallelism)
    numbers = np.arange(24.0, dtype=np.float32)
    total, devices = mapped(replicate(np.float32(2)), shard(numbers, 0))
    assert total.shape == devices.shape == ()
    assert total == 2 * numbers.sum()
    assert devices == 8
    assert mapped(total, shard(numbers, 0))[0] == total * numbers.sum()


@pytest.mark.parametrize("parallelism", PARALLELISMS)
def test_donated_arguments_are_gone(parallelism):
    def function(x, share):
        return x + jax.lax.psum(share, DEVICE_AXIS)

    mapped = map_over_devices(
        function, in_axes=(None, 0), donate_argnums=(0,), parallelism=parallelism
    )
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


@pytest.mark.parametrize("parallelism", PARALLELISMS)
def test_memory_of_a_mapped_function(parallelism):
    mapped = map_over_devices(
        lambda x, share: x + jax.lax.psum(jnp.sum(share), DEVICE_AXIS),
        in_axes=(None, 0),
        parallelism=parallelism,
    )
    lowered = mapped.lower(replicate(np.zeros(1_000, np.float32)), np.ones((8, 3)))
    memory = lowered.compile().memory_analysis()
    assert 4_000 <= memory.argument_size_in_bytes < 4_200
    assert memory.output_size_in_bytes == 4_000


def test_moments_axes():
    assert moments_axes("global") == {"axis_name": DEVICE_AXIS}
    assert moments_axes("local") == {"axis_name": None}
    assert moments_axes("4") == {
        "axis_name": DEVICE_AXIS,
        "axis_index_groups": ((0, 1, 2, 3), (4, 5, 6, 7)),
    }
    for wrong in ("3", "0", "-1", "16", "all", "", "2.0"):
        with pytest.raises(DeviceError, match=f"--config.moments={wrong}: expected"):
            moments_axes(wrong)


@pytest.mark.parametrize(
    ("batch_size", "moments", "works"),
    [
        *((8, "global", True), (8, "1", False), (8, "2", True)),
        *((8, "local", False), (16, "local", True), (16, "1", True)),
    ],
)
def test_one_example_alone_is_refused(batch_size, moments, works):
    config = {"batch_size": batch_size, "moments": moments, "parallelism": "pmap"}
    if works:
        check_launch(config)
    else:
        with pytest.raises(DeviceError, match="one example alone cannot be normalised"):
            check_launch(config)


def test_parts_of_processes(monkeypatch):
    array = np.arange(24).reshape(2, 12)
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    parts = []
    for number in range(3):
        monkeypatch.setattr(jax, "process_index", lambda number=number: number)
        parts.append(own_part(array, axis=1))
    assert [part.shape for part in parts] == [(2, 4)] * 3
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), array)


def test_copies():
    tree = {"a": replicate(np.arange(3.0))}
    assert as_global(tree)["a"] is tree["a"]
    copy = one_copy(tree)["a"]
    assert len(copy.devices()) == 1
    np.testing.assert_array_equal(copy, np.arange(3.0))


def test_a_placed_batch_lies_on_all_devices_as_shards_do(monkeypatch):
    batch = np.arange(48).reshape(16, 3)
    placed = place(batch)
    np.testing.assert_array_equal(placed, shard(batch, axis=0))
    assert len(placed.sharding.device_set) == jax.device_count()
    # Several processes have a part each, which the call divides.
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert place(batch) is batch


@pytest.mark.parametrize("parallelism", PARALLELISMS)
def test_mapped_functions_take_placed_batches(parallelism):
    function = map_over_devices(
        lambda x: jax.lax.psum(x.sum(), DEVICE_AXIS),
        in_axes=(0,),
        parallelism=parallelism,
    )
    batch = np.arange(48, dtype=np.float32).reshape(16, 3)
    assert function(place(batch)) == batch.sum()
