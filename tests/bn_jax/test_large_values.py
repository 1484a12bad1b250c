"""Values up to the largest float, and batches that are not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax import (
    BatchStats,
    batch_norm,
    batch_renorm,
    ghost_batch_norm,
    init_params,
    init_stats,
    merge_moments,
    moments,
)
from tests.bn_jax.forms import FORMS, on_platform

SIZES = [1e18, 1e20, 1e30, 1.1e38]
PARAMS, STATS = init_params(3), init_stats(3)
LARGEST = np.finfo(np.float32).max


def normal(size: float, shape=(64, 3), mean: float = 0.0) -> np.ndarray:
    wide = np.random.default_rng(0).normal(mean, 1, shape).clip(-3, 3)
    return np.float32(size * wide)


def step(x, weights=None, axis_name=None, **options):
    """Everything that a step computes."""

    def forward(params, x):
        return batch_norm(
            params,
            STATS,
            x,
            train=True,
            weights=weights,
            axis_name=axis_name,
            **options,
        )

    y, pullback, stats = jax.vjp(forward, PARAMS, x, has_aux=True)
    return (
        y,
        stats,
        pullback(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)),
    )


def assert_finite(tree):
    for leaf in jax.tree.leaves(tree):
        assert np.all(np.isfinite(np.float64(leaf)))


@pytest.mark.parametrize("platform", FORMS)
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("mean", [0.0, 1.0])
@pytest.mark.parametrize("size", SIZES)
def test_no_nan_from_finite_values(platform, activation, size, mean):
    x = normal(size, mean=mean)
    compute = on_platform(platform, lambda x: step(x, activation=activation))
    assert_finite(compute(x))


@pytest.mark.parametrize("order", ["sorted", "two values", "one outlier"])
def test_no_nan_whatever_the_order(order):
    rows = {
        "sorted": np.linspace(-3.4e38, 3.4e38, 4096),
        "two values": np.repeat([3.4e38, -3.4e38], [64, 4032]),
        "one outlier": np.r_[np.zeros(4095), 3.4e38],
    }[order]
    x = np.float32(np.stack([rows, rows[::-1], -rows], axis=-1))
    assert_finite(jax.jit(step)(x))
    weights = np.float32(np.arange(4096) % 3)[:, None]
    assert_finite(jax.jit(step)(x, weights))


@pytest.mark.parametrize("size", SIZES)
def test_no_nan_over_devices(size):
    x = normal(size, (16, 8, 3), mean=1.0)
    for number in (4, 16):  # in one collective and in two
        parts = x.reshape(number, -1, 3)
        weights = np.ones((*parts.shape[:2], 1), np.float32)
        weights[0] = 0
        mapped = jax.vmap(lambda x, w: step(x, w, axis_name="a"), axis_name="a")
        assert_finite(jax.jit(mapped)(parts, weights))


@pytest.mark.parametrize("size", [1e15, 1e18])
def test_normalised_as_long_as_the_variance_is_a_float(size):
    y, stats, _ = step(normal(size), eps=1e-5)
    np.testing.assert_allclose(y.std(0), 1, rtol=1e-5)
    exact = np.float64(normal(size)).var(0, ddof=1)
    np.testing.assert_allclose(stats.var, 0.99 + 0.01 * exact, rtol=1e-5)


def test_beyond_that_y_is_the_bias_and_the_variance_the_largest_float():
    x = normal(1e25)
    np.testing.assert_array_equal(moments(x).var, np.full(3, LARGEST))
    y, stats, _ = step(x)
    np.testing.assert_array_equal(y, np.zeros_like(x))
    # Healthy batches move the statistics back.
    for _ in range(3):
        _, moved = batch_norm(PARAMS, stats, normal(1.0), train=True, decay=0.5)
        assert np.all(moved.var < 0.51 * stats.var)
        stats = moved


def test_merging_overflowed_moments():
    parts = [moments(normal(size)) for size in (1.0, 1e30, 1e38)]
    empty = moments(normal(1.0), weights=np.zeros((64, 1), np.float32))
    assert_finite(merge_moments(*parts, empty))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("transform", [batch_norm, batch_renorm, ghost_batch_norm])
def test_decay_1_leaves_the_statistics_alone(bad, transform):
    x = normal(1.0)
    x[5, 1] = bad
    options = {
        batch_norm: {},
        batch_renorm: {"r_max": 3.0, "d_max": 5.0},
        ghost_batch_norm: {"virtual_batch_size": 16},
    }[transform]
    for decay in (1, 1.0, jnp.float32(1)):
        _, new = transform(PARAMS, STATS, x, train=True, decay=decay, **options)
        for old, after in zip(STATS, new, strict=True):
            np.testing.assert_array_equal(after, old)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("transform", [batch_norm, batch_renorm, ghost_batch_norm])
def test_skipping_batches_that_are_not_finite(bad, transform):
    options = {
        batch_norm: {},
        batch_renorm: {"r_max": 3.0, "d_max": 5.0},
        ghost_batch_norm: {"virtual_batch_size": 16},
    }[transform]
    old = BatchStats(jnp.float32([1, 2, 3]), jnp.float32([4, 5, 6]))
    x = normal(1.0)
    _, moved = transform(PARAMS, old, x, train=True, **options)
    _, same = transform(PARAMS, old, x, train=True, skip_nonfinite=True, **options)
    for a, b in zip(moved, same, strict=True):
        np.testing.assert_array_equal(a, b)
    x[5, 1] = bad
    _, spoilt = transform(PARAMS, old, x, train=True, **options)
    assert not np.all(np.isfinite(np.stack(spoilt)))
    _, kept = transform(PARAMS, old, x, train=True, skip_nonfinite=True, **options)
    for a, b in zip(kept, old, strict=True):
        np.testing.assert_array_equal(a, b)
