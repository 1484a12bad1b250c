"""Sharing moments over devices is concatenating their shards."""

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from bn_jax import BatchNormParams, batch_norm, init_params, init_stats
from tests.bn_jax.reference import (
    Problem,
    Step,
    actual_step,
    assert_close,
    assert_steps_close,
    expected_step,
    make_problem,
    plain_batch_norm,
)
from tests.bn_jax.sharing import (
    MODES,
    MODES_WITH_GROUPS,
    device_mesh,
    map_devices,
    shared_step,
    step_on_device,
)

REPOSITORY = Path(__file__).parents[2]
F32 = 32 * np.finfo(np.float32).eps
GROUPS = ((0, 3), (2, 1))
each_mode = pytest.mark.parametrize("mode", MODES)


def assert_shared(got: Step, expected: Step, tolerance: float = F32) -> None:
    """Every device holds the same statistics, and the rest is as on one device."""
    for name in ("mean", "var"):
        field = getattr(got, name)
        np.testing.assert_array_equal(field, np.broadcast_to(field[:1], field.shape))
    got = got._replace(mean=got.mean[0], var=got.var[0])
    assert_steps_close(got, expected, tolerance)


def rows_valid(*numbers: int) -> np.ndarray:
    """Weights of devices with 8 rows each, of which the first few are valid."""
    return np.float32(np.arange(8)[None] < np.array(numbers)[:, None]).reshape(-1, 1)


@each_mode
@pytest.mark.parametrize("activation", [None, "relu"])
def test_even_shards(mode, activation):
    problem = make_problem((12, 3))
    expected = expected_step(problem, activation=activation)
    assert_shared(shared_step(mode, problem, 4, activation=activation), expected)


@each_mode
def test_even_shards_of_images(mode):
    problem = make_problem((8, 3, 2, 2), 1)
    assert_shared(shared_step(mode, problem, 8, axis=1), expected_step(problem, axis=1))


@each_mode
@pytest.mark.parametrize("numbers", [(8, 4, 2, 1), (3, 0, 8, 1), (0, 0, 1, 0)])
def test_uneven_valid_rows(mode, numbers):
    problem = make_problem((32, 3), seed=1)
    weights = rows_valid(*numbers)
    # Where one value counts, 1 / sqrt(eps) times the rounding of 0 is the gradient.
    expected = expected_step(problem, weights=weights, eps=1e-3)
    x = np.where(weights == 0, np.nan, problem.x)
    got = shared_step(mode, problem._replace(x=x), 4, weights, eps=1e-3)
    assert_shared(got, expected)


@each_mode
def test_no_valid_row_on_any_device(mode):
    problem = make_problem((32, 3))
    step = shared_step(mode, problem, 4, rows_valid(0, 0, 0, 0))
    for field in (step.y, step.dx, step.dscale, step.dbias):
        assert not np.any(field)
    np.testing.assert_array_equal(step.mean, np.tile(problem.stats.mean, (4, 1)))
    np.testing.assert_array_equal(step.var, np.tile(problem.stats.var, (4, 1)))


@each_mode
def test_merging_loses_nothing_at_a_large_mean(mode):
    # Devices differ by more than their spread, so that both parts of Chan's formula
    # matter, at 1e4 times the spread from zero.
    problem = make_problem((64, 3), seed=2, mean=1e4)
    x = problem.x + 3 * np.repeat(np.arange(4), 16)[:, None].astype(np.float32)
    problem = problem._replace(x=x)
    expected = expected_step(problem, decay=0.0)
    got = shared_step(mode, problem, 4, decay=0.0)
    alone = actual_step(problem, decay=0.0)
    # Half a unit in the last place of the mean is 5e-4, and of each part's mean.
    assert_shared(got, expected, 2e-3)
    error = np.abs(got.y - expected.y).max()
    assert error <= 2 * np.abs(alone.y - expected.y).max() + F32


def expected_of_groups(
    problem: Problem, groups: tuple[tuple[int, ...], ...], weights: np.ndarray
) -> Step:
    """One step per group on its devices' rows, put back in the order of devices."""
    devices = np.arange(len(weights)) // 8
    parts = []
    for group in groups:
        own = np.isin(devices, group)
        part = problem._replace(x=problem.x[own], dy=problem.dy[own])
        parts.append((group, own, expected_step(part, weights=weights[own])))
    y, dx = np.zeros((2, *problem.x.shape))
    mean, var = np.zeros((2, 4, 3))
    for group, own, part in parts:
        y[own], dx[own] = part.y, part.dx
        mean[list(group)], var[list(group)] = part.mean, part.var
    dscale, dbias = (sum(part[i] for *_, part in parts) for i in (-2, -1))
    return Step(y, mean, var, dx, dscale, dbias)


@pytest.mark.parametrize("mode", MODES_WITH_GROUPS)
@pytest.mark.parametrize("numbers", [(8, 8, 8, 8), (8, 4, 2, 1), (0, 3, 1, 0)])
def test_groups_concatenate_within_themselves(mode, numbers):
    problem = make_problem((32, 3), seed=3)
    weights = rows_valid(*numbers)
    expected = expected_of_groups(problem, GROUPS, weights)
    got = shared_step(mode, problem, 4, weights, axis_index_groups=GROUPS)
    assert_steps_close(got, expected, F32)


@pytest.mark.parametrize("mode", MODES_WITH_GROUPS)
@pytest.mark.parametrize("groups", [((0, 1, 2, 3),), ((0,), (1,), (2,), (3,))])
def test_groups_of_all_and_of_one(mode, groups):
    problem = make_problem((32, 3), seed=4)
    weights = rows_valid(8, 8, 8, 8)
    expected = expected_of_groups(problem, groups, weights)
    got = shared_step(mode, problem, 4, axis_index_groups=groups)
    assert_steps_close(got, expected, F32)


def test_vmap_has_no_groups():
    with pytest.raises(NotImplementedError, match=r"axis_index_groups .* vmap"):
        shared_step("vmap", make_problem((32, 3)), 4, axis_index_groups=GROUPS)


@pytest.mark.parametrize("mode", ["checked", "unchecked", "vmap", "pmap"])
@pytest.mark.parametrize("axis_name", [("b", "a"), ("a",)])
def test_several_mapped_axes(mode, axis_name):
    problem = make_problem((16, 3), seed=5)
    weights = np.random.default_rng(0).integers(0, 3, (16, 1)).astype(np.float32)
    step = step_on_device(axis_name=axis_name)
    split = [jnp.asarray(a).reshape(2, 4, 2, -1) for a in (*problem[2:], weights)]
    if mode in ("pmap", "vmap"):
        in_axes = (None, None, 0, 0, 0)
        inner = jax.vmap(step, axis_name="b", in_axes=in_axes)
        outer = jax.pmap if mode == "pmap" else jax.vmap
        mapped = outer(inner, axis_name="a", in_axes=in_axes)
        got = jax.jit(mapped)(*problem[:2], *split)
    else:

        def one_device(params, stats, *own):
            got = step(params, stats, *(array[0, 0] for array in own))
            return jax.tree.map(lambda leaf: leaf[None, None], got)

        none, both = PartitionSpec(), PartitionSpec("a", "b")
        got = jax.jit(
            jax.shard_map(
                one_device,
                mesh=device_mesh(2, 4),
                in_specs=(none, none, both, both, both),
                out_specs=both,
                check_vma=mode == "checked",
            )
        )(*problem[:2], *split)
    got = Step(*(np.asarray(field) for field in got))
    dscale, dbias = got.dscale.sum((0, 1)), got.dbias.sum((0, 1))
    if mode == "checked":
        dscale, dbias = got.dscale[0, 0], got.dbias[0, 0]
    got = got._replace(dscale=dscale, dbias=dbias)
    # Sharing over "a" alone: one separate batch for each index along "b".
    both = len(axis_name) == 2
    batches = [np.s_[:, :]] if both else [np.s_[:, i] for i in range(4)]
    parts = []
    for batch in batches:
        x, dy, own_weights = (np.asarray(a)[batch] for a in split)
        part = problem._replace(x=x.reshape(-1, 3), dy=dy.reshape(-1, 3))
        part = expected_step(part, weights=own_weights.reshape(-1, 1))
        parts.append(part)
        for name in ("y", "dx"):
            own = getattr(got, name)[batch].reshape(-1, 3)
            assert_close(own, getattr(part, name), F32, name)
        for name in ("mean", "var"):
            own = getattr(got, name)[batch].reshape(-1, 3)
            assert_close(own, np.tile(getattr(part, name), (len(own), 1)), F32, name)
    assert_close(got.dscale, sum(part.dscale for part in parts), F32)
    assert_close(got.dbias, sum(part.dbias for part in parts), F32)


def test_checked_mode_knows_that_statistics_are_replicated():
    params, stats, x, _ = make_problem((8, 3))
    share = functools.partial(batch_norm, train=True, axis_name="a")
    none, split = PartitionSpec(), PartitionSpec("a")
    y, new_stats = jax.jit(
        jax.shard_map(
            share,
            mesh=device_mesh(4),
            in_specs=(none, none, split),
            out_specs=(split, none),
        )
    )(params, stats, jnp.asarray(x))
    expected = actual_step(make_problem((8, 3)))
    assert_close(y, expected.y, F32)
    assert_close(new_stats.mean, expected.mean, F32)
    assert_close(new_stats.var, expected.var, F32)


@each_mode
def test_inference_needs_no_sharing(mode):
    params, stats, x, _ = make_problem((8, 3))

    def infer(params, stats, x):
        return batch_norm(params, stats, x, train=False, axis_name="a")[0]

    split = jnp.asarray(x).reshape(4, 2, 3)
    y = map_devices(mode, infer, 4, replicated=2)(params, stats, split)
    expected = batch_norm(params, stats, jnp.asarray(x), train=False)[0]
    assert_close(np.asarray(y).reshape(8, 3), expected, F32)


def mean_loss(kernel, params, stats, x, target, **options: Any) -> jax.Array:
    y, _ = batch_norm(params, stats, x @ kernel, train=True, **options)
    return jnp.mean((y - target) ** 2)


@each_mode
def test_data_parallel_step_averages_gradients(mode):
    params, stats, x, target = make_problem((16, 3), seed=6)
    kernel = np.random.default_rng(0).normal(size=(3, 3)).astype(np.float32)

    def device_grad(kernel, params, stats, x, target):
        loss = functools.partial(mean_loss, axis_name="a", activation="relu")
        grads = jax.grad(loss, (0, 1))(kernel, params, stats, x, target)
        # Where parameters are known to be replicated, JAX has summed already.
        if mode == "checked":
            return jax.tree.map(lambda g: g / 4, grads)
        return jax.lax.pmean(grads, "a")

    split = (jnp.asarray(a).reshape(4, 4, 3) for a in (x, target))
    mapped = map_devices(mode, device_grad, 4, replicated=3)
    got = mapped(kernel, params, stats, *split)
    expected = jax.grad(functools.partial(mean_loss, activation="relu"), (0, 1))(
        kernel, params, stats, x, target
    )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert_close(a, np.broadcast_to(b, a.shape), F32)


@each_mode
def test_devices_may_hold_different_scales(mode):
    _, stats, x, dy = make_problem((8, 3), seed=7)
    scales = np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32)
    weights = np.random.default_rng(2).uniform(0.5, 2, (8, 1)).astype(np.float32)

    def device_grad(stats, x, dy, weights, scale):
        def loss(x, weights, scale):
            params = BatchNormParams(scale, None)
            y = batch_norm(
                params, stats, x, train=True, weights=weights, axis_name="a"
            )[0]
            return jnp.vdot(dy, y)

        return jax.grad(loss, (0, 1, 2))(x, weights, scale)

    def plain_loss(x, weights, scales):
        unscaled = plain_batch_norm(init_params(3), x, weights=weights)
        return jnp.vdot(dy, unscaled * jnp.repeat(scales, 2, axis=0))

    split = (jnp.asarray(a).reshape(4, 2, -1) for a in (x, dy, weights))
    mapped = map_devices(mode, device_grad, 4)
    got = mapped(stats, *split, jnp.asarray(scales))
    expected = jax.jit(jax.grad(plain_loss, (0, 1, 2)))(x, weights, scales)
    for a, b in zip(got, expected, strict=True):
        assert_close(np.asarray(a).reshape(b.shape), b, F32)


@pytest.mark.parametrize("mode", ["checked", "unchecked", "vmap", "pmap"])
def test_replicated_input_counts_once_per_device(mode):
    problem = make_problem((6, 3))

    def device(params, x, index):
        stats = init_stats(3)
        y, new = batch_norm(params, stats, x, train=True, axis_name="a", decay=0.0)
        return y, new.var + 0 * index

    mapped = map_devices(mode, device, 4, replicated=2)
    y, var = mapped(problem.params, jnp.asarray(problem.x), jnp.zeros((4, 1)))
    # m is 24, of which every value is there four times.
    expected = np.float64(np.tile(problem.x, (4, 1))).var(0, ddof=1)
    assert_close(var, np.tile(expected, (4, 1)), F32)
    assert_close(y[0], expected_step(problem).y, F32)


def test_more_devices_than_gather():
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=32",
        "JAX_CPU_ENABLE_ASYNC_DISPATCH": "false",
    }
    command = [sys.executable, "-W", "error", "-m", "tests.bn_jax.many_devices_process"]
    run = subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=REPOSITORY
    )
    assert run.stdout == "all the same\n", run.stderr
