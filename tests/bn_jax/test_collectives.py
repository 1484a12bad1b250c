"""Gathering and summing over mapped axes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax import batch_norm, collectives, init_params, init_stats
from tests.bn_jax.sharing import MODES, MODES_WITH_GROUPS, map_devices

GROUPS = ((0, 2), (3, 1))
VALUES = np.arange(8, dtype=np.float32).reshape(4, 2)


def run(mode: str, function, values: np.ndarray = VALUES) -> np.ndarray:
    mapped = map_devices(mode, function, len(values), replicated=0)
    return np.asarray(mapped(jnp.asarray(values)))


def gather(value: jax.Array, groups=None) -> jax.Array:
    return collectives.gather(value, "a", groups)


def group_sum(value: jax.Array, groups=None) -> jax.Array:
    return collectives.group_sum(value, "a", groups)


@pytest.mark.parametrize("mode", MODES)
def test_gather_stacks_in_the_order_of_the_axis(mode):
    np.testing.assert_array_equal(run(mode, gather), np.tile(VALUES, (4, 1, 1)))


@pytest.mark.parametrize("mode", MODES_WITH_GROUPS)
def test_gather_stacks_in_the_order_of_the_group(mode):
    got = run(mode, functools.partial(gather, groups=GROUPS))
    first, second = VALUES[[0, 2]], VALUES[[3, 1]]
    np.testing.assert_array_equal(got, [first, second, first, second])


@pytest.mark.parametrize("mode", MODES)
def test_a_nan_stays_in_its_slot(mode):
    values = VALUES.copy()
    values[2] = np.nan
    got = run(mode, gather, values)
    np.testing.assert_array_equal(got, np.tile(values, (4, 1, 1)))


@pytest.mark.parametrize("mode", MODES)
def test_group_sum_over_all(mode):
    got = run(mode, group_sum)
    np.testing.assert_array_equal(got, np.tile([12, 16], (4, 1)))


@pytest.mark.parametrize("mode", MODES_WITH_GROUPS)
def test_group_sum_over_groups(mode):
    got = run(mode, functools.partial(group_sum, groups=GROUPS))
    np.testing.assert_array_equal(got, [[4, 6], [8, 10], [4, 6], [8, 10]])


def test_group_sum_without_an_axis_is_the_value():
    value = jnp.ones(3)
    assert collectives.group_sum(value, None, None) is value


def test_group_size():
    assert collectives.group_size(None, None) == 1
    sizes = []

    def record(value):
        sizes.append(collectives.group_size("a", None))
        sizes.append(collectives.group_size("a", GROUPS))
        sizes.append(collectives.group_size(("a",), None))
        return value

    run("vmap", record)
    assert sizes == [4, 2, 4]


def test_groups_become_hashable():
    got = []

    def record(value):
        got.append(collectives.check_groups("a", [[0, np.int32(2)], [3, 1]]))
        return value

    run("vmap", record)
    assert got == [GROUPS]
    assert hash(got[0]) == hash(GROUPS)
    assert collectives.check_groups("a", None) is None


def train_with_groups(x: jax.Array, groups) -> jax.Array:
    return batch_norm(
        init_params(2),
        init_stats(2),
        x,
        train=True,
        axis_name="a",
        axis_index_groups=groups,
    )[0]


@pytest.mark.parametrize("mode", MODES_WITH_GROUPS)
@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([[0, 1]], r"each index from 0 to 3 of axis 'a' exactly once"),
        ([[0, 1], [1, 2]], r"each index from 0 to 3 of axis 'a' exactly once"),
        ([[0, 1], [2, 4]], r"each index from 0 to 3 of axis 'a' exactly once"),
        ([], r"each index from 0 to 3 of axis 'a' exactly once"),
        ([[0], [1, 2, 3]], r"groups of one size, got sizes \[1, 3\]"),
    ],
)
def test_groups_must_be_a_partition(mode, groups, message):
    x = np.ones((4, 3, 2), np.float32)
    with pytest.raises(ValueError, match=message):
        run(mode, functools.partial(train_with_groups, groups=groups), x)


def test_groups_need_an_axis():
    with pytest.raises(ValueError, match="axis_index_groups was given without axis_na"):
        batch_norm(
            init_params(2),
            init_stats(2),
            jnp.ones((4, 2)),
            train=True,
            axis_index_groups=GROUPS,
        )


def test_one_value_per_feature_in_a_group_of_one():
    alone = functools.partial(train_with_groups, groups=[[0], [1], [2], [3]])
    with pytest.raises(ValueError, match="more than one value per feature"):
        run("pmap", alone, np.ones((4, 1, 2), np.float32))
