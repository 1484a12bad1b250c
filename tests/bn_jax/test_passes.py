"""Whole steps in the forms of all platforms: all compute the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from bn_jax import batch_norm, ghost_batch_norm
from bn_jax.forms import TPU
from bn_jax.layout import make_layout
from bn_jax.passes import moments_pass
from tests.bn_jax.forms import FORMS, on_platform
from tests.bn_jax.reference import (
    actual_step,
    assert_close,
    assert_steps_close,
    expected_step,
    lenient,
    make_problem,
)
from tests.bn_jax.sharing import device_mesh, map_devices, step_on_device

EACH_PLATFORM = pytest.mark.parametrize("platform", FORMS)


@EACH_PLATFORM
# About a large mean, rounding may pick either side of a kink.
@pytest.mark.parametrize(
    ("activation", "mean"), [(None, 0.5), (None, 1e4), ("relu", 0.5)]
)
@pytest.mark.parametrize("with_weights", [False, True])
@pytest.mark.parametrize(("shape", "axis"), [((64, 3), -1), ((4, 6, 5, 3), 1)])
def test_step(platform, shape, axis, activation, with_weights, mean):
    problem = make_problem(shape, axis, mean=mean)
    options = {"axis": axis, "activation": activation}
    weights = None
    if with_weights:
        x = np.array(problem.x)
        weights = np.ones((shape[0],) + (1,) * (len(shape) - 1), np.float32)
        weights[::3] = 0
        expected = expected_step(problem, weights=weights, **options)
        x[::3] = np.nan
        problem = problem._replace(x=x)
    else:
        expected = expected_step(problem, **options)

    def step(problem, weights):
        return actual_step(problem, weights=weights, **options)

    # Half a unit in the last place of the mean, relative to the deviation.
    tolerance = 2e-5 + np.spacing(np.float32(mean))
    step = on_platform(platform, step)(problem, weights)
    assert_steps_close(step, expected, tolerance)


@EACH_PLATFORM
@pytest.mark.parametrize("mode", ["vmap", "checked", "unchecked", "cast"])
@pytest.mark.parametrize("mean", [0.5, 1e4])
def test_sharing(platform, mode, mean):
    problem = make_problem((16, 3), mean=mean)
    mapped = map_devices(mode, step_on_device(axis_name="a"), 4, replicated=2)
    arrays = jax.tree.map(
        lambda array: np.reshape(array, (4, 4, 3)) if array.ndim > 1 else array, problem
    )
    if mode != "vmap":
        arrays = jax.device_put(arrays, NamedSharding(device_mesh(4), PartitionSpec()))
    step = on_platform(platform, mapped)(*arrays)
    expected = expected_step(problem)
    for name in ("mean", "var"):
        field = np.asarray(getattr(step, name))
        np.testing.assert_array_equal(field, np.tile(field[:1], (4, 1)))
        assert_close(field[0], getattr(expected, name), 2e-5)
    tolerance = 2e-5 + 2 * np.spacing(np.float32(mean))
    for name in ("y", "dx"):
        found = np.reshape(getattr(step, name), (16, 3))
        assert_close(found, getattr(expected, name), tolerance, name)


@EACH_PLATFORM
def test_nothing_but_padding(platform):
    params, stats, x, _ = make_problem((6, 3))

    def step(x, weights):
        return batch_norm(params, stats, x, train=True, weights=weights)

    y, new = on_platform(platform, step)(x, np.zeros((6, 1), np.float32))
    np.testing.assert_array_equal(y, np.zeros_like(x))
    np.testing.assert_array_equal(new.mean, stats.mean)
    np.testing.assert_array_equal(new.var, stats.var)


@EACH_PLATFORM
def test_ghost_batches(platform):
    params, stats, x, _ = make_problem((8, 3))
    ghost = functools.partial(ghost_batch_norm, train=True, virtual_batch_size=4)
    y, _ = on_platform(platform, ghost)(params, stats, x)
    for part in (slice(0, 4), slice(4, 8)):
        alone, _ = batch_norm(params, stats, x[part], train=True)
        np.testing.assert_allclose(y[part], alone, rtol=1e-5, atol=1e-6)


@EACH_PLATFORM
def test_second_derivatives(platform):
    params, stats, x, _ = make_problem((5, 2))

    def loss(x):
        with lenient():
            y, _ = batch_norm(params, stats, x, train=True, activation="relu")
            return jnp.sum(y**3)

    x = jnp.asarray(x)
    tangent = jnp.cos(x)

    def forward_over_reverse(x, tangent):
        return jax.jvp(jax.grad(loss), (x,), (tangent,))[1]

    actual = on_platform(platform, forward_over_reverse)(x, tangent)
    step = 1e-2
    expected = (
        jax.grad(loss)(x + step * tangent) - jax.grad(loss)(x - step * tangent)
    ) / (2 * step)
    np.testing.assert_allclose(actual, expected, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize(
    ("platform", "hides", "chooses"),
    [("cpu", True, False), ("cuda", True, False), ("tpu", False, True)],
)
def test_what_a_training_step_is_lowered_to(platform, hides, chooses):
    problem = make_problem((8, 4))

    def loss(params, stats, x):
        y, _ = batch_norm(params, stats, x, train=True, activation="relu")
        return jnp.sum(y**2)

    traced = jax.jit(jax.grad(loss)).trace(*problem[:3])
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    if hides:
        assert "stablehlo.optimization_barrier" in text
    # What the choice between two ways to the moments is made by.
    assert ("dense<8.750000e-01>" in text) == chooses


def about(expected_mean, x, weights=None):
    """Mean and variance as on TPU."""
    one_pass = functools.partial(moments_pass, TPU, make_layout(x.shape, -1))
    expected_mean = jnp.asarray(expected_mean, jnp.float32)
    return jax.jit(one_pass)(jnp.asarray(x), weights, expected_mean)


@pytest.mark.parametrize("mean", [0, 300, 1e4])
@pytest.mark.parametrize("off", [0, 0.5, 2.5, 3, 1e3, 1e6, np.nan, np.inf])
def test_how_far_off_the_expected_mean_is_makes_no_difference(mean, off):
    x = np.random.default_rng(0).normal(mean, 1, (4096, 3)).astype(np.float32)
    found, var = about(np.full(3, mean + off), x)
    exact = np.float64(x)
    # What the mean is rounded to, and a sum's error where much cancels.
    error = np.abs(found - exact.mean(0)).max()
    assert error <= 0.5 * np.spacing(np.float32(mean)) + 2e-6
    assert np.abs(var - exact.var(0)).max() <= 5e-6


def test_one_feature_that_is_off_is_enough():
    x = np.random.default_rng(0).normal(1e4, 1, (4096, 3)).astype(np.float32)
    near, far = about([1e4, 1e4, 1e4], x), about([1e4, 1e4, 0], x)
    one_pass = functools.partial(moments_pass, TPU, make_layout(x.shape, -1))
    sampled = jax.jit(one_pass)(x, None, None)
    for a, b in zip(far, sampled, strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.any(near[1] != sampled[1])


def test_an_expected_mean_with_weights():
    x = np.random.default_rng(0).normal(5, 1, (64, 3)).astype(np.float32)
    weights = np.ones((64, 1), np.float32)
    weights[::4] = 0
    x[::4] = np.nan
    exact = np.float64(np.delete(x, np.s_[::4], axis=0))
    for expected in (5, -1000):
        mean, var = about(np.full(3, expected), x, weights)
        np.testing.assert_allclose(mean, exact.mean(0), rtol=1e-6)
        np.testing.assert_allclose(var, exact.var(0), rtol=1e-5)
    mean, var = about(np.full(3, 5), x, np.zeros_like(weights))
    np.testing.assert_array_equal(mean, np.zeros(3))
    np.testing.assert_array_equal(var, np.zeros(3))


def test_a_nan_in_x_is_in_its_features_moments_alone():
    x = np.random.default_rng(0).normal(0, 1, (64, 3)).astype(np.float32)
    x[7, 1] = np.nan
    for moment in about(np.zeros(3), x):
        np.testing.assert_array_equal(np.isnan(moment), [False, True, False])


@pytest.mark.parametrize("mean", [0, 3, 50])
@pytest.mark.parametrize("expected", [0, 1, 3, 51, 1e4, -1e6, np.nan, np.inf])
@pytest.mark.parametrize("with_weights", [False, True])
def test_bfloat16_about_an_expected_mean_or_0(mean, expected, with_weights):
    """What cancels is less than what rounding to bfloat16 has moved the variance by."""
    wide = np.random.default_rng(0).normal(mean, 1, (4096, 3)).astype(np.float32)
    x = jnp.asarray(wide, jnp.bfloat16)
    weights, exact = None, np.float64(np.asarray(x, np.float32))
    if with_weights:
        weights = np.ones((4096, 1), np.float32)
        weights[::4] = 0
        x = x.at[::4].set(jnp.nan)
        exact = np.delete(exact, np.s_[::4], axis=0)
    found, var = about(np.full(3, expected), x, weights)
    off = min(abs(mean - expected), mean) if np.isfinite(expected) else mean
    error = 32 * (1 + off**2) * 2.0**-24  # of a sum of thousands
    np.testing.assert_allclose(var, exact.var(0), rtol=error)
    np.testing.assert_allclose(found, exact.mean(0), rtol=1e-6, atol=1e-6)
    if mean == 50 and not with_weights:
        moved_by_rounding = np.abs(exact.var(0) - np.float64(wide).var(0)).max()
        assert np.abs(var - exact.var(0)).max() < moved_by_rounding / 2


def test_bfloat16_of_nothing_but_padding_has_no_mean():
    x = jnp.full((8, 3), jnp.nan, jnp.bfloat16)
    for moment in about(np.full(3, 5), x, np.zeros((8, 1), np.float32)):
        np.testing.assert_array_equal(moment, np.zeros(3))
