"""The moving average of the statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax import BatchStats, Moments, batch_norm, init_params, init_stats
from bn_jax.statistics import update_stats
from tests.bn_jax.reference import assert_close
from tests.bn_jax.sharing import map_devices

OLD = BatchStats(jnp.array([1.0, -2.0]), jnp.array([2.0, 0.5]))
BATCH = Moments(jnp.array([4.0, 4.0]), jnp.array([3.0, 2.0]), jnp.array([6.0, 3.0]))


def test_start_as_those_of_flax():
    stats = init_stats((2, 3))
    np.testing.assert_array_equal(stats.mean, np.zeros((2, 3)))
    np.testing.assert_array_equal(stats.var, np.ones((2, 3)))
    assert stats.mean.dtype == stats.var.dtype == jnp.float32


def test_numbers_worked_by_hand():
    # decay 3/4: mean 3/4 * 1 + 1/4 * 3 = 1.5 and 3/4 * -2 + 1/4 * 2 = -1; the batch's
    # variance is 6 * 4/3 = 8 and 3 * 4/3 = 4, so 1.5 + 2 = 3.5 and 0.375 + 1 = 1.375.
    mean, var = update_stats(OLD, BATCH, decay=0.75, unbiased=True)
    assert_close(mean, [1.5, -1], 1e-7)
    assert_close(var, [3.5, 1.375], 1e-7)
    # Biased: 1.5 + 6/4 = 3 and 0.375 + 3/4 = 1.125.
    mean, var = update_stats(OLD, BATCH, decay=0.75, unbiased=False)
    assert_close(mean, [1.5, -1], 1e-7)
    assert_close(var, [3, 1.125], 1e-7)


def test_decay_of_one_keeps_and_of_zero_replaces():
    kept = update_stats(OLD, BATCH, decay=1, unbiased=True)
    np.testing.assert_array_equal(kept.mean, OLD.mean)
    np.testing.assert_array_equal(kept.var, OLD.var)
    new = update_stats(OLD, BATCH, decay=0, unbiased=False)
    np.testing.assert_array_equal(new.mean, BATCH.mean)
    np.testing.assert_array_equal(new.var, BATCH.var)


def test_features_without_values_stay():
    batch = BATCH._replace(count=jnp.array([0.0, 4.0]))
    mean, var = update_stats(OLD, batch, decay=0.5, unbiased=True)
    assert (mean[0], var[0]) == (OLD.mean[0], OLD.var[0])
    assert (mean[1], var[1]) != (OLD.mean[1], OLD.var[1])


@pytest.mark.parametrize("count", [1e-3, 0.5, 1.0, 1.5])
def test_little_weight_gives_no_wild_correction(count):
    batch = BATCH._replace(count=jnp.full(2, count))
    var = update_stats(OLD, batch, decay=0, unbiased=True).var
    assert_close(var, 2 * BATCH.var, 1e-6)


def test_decay_may_be_traced():
    @jax.jit
    def update(decay):
        return update_stats(OLD, BATCH, decay=decay, unbiased=True)

    for decay in (0.0, 0.25, 0.9, 1.0):
        expected = update_stats(OLD, BATCH, decay=decay, unbiased=True)
        assert_close(update(decay).mean, expected.mean, 1e-6)
        assert_close(update(decay).var, expected.var, 1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("x_dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("stats_dtype", ["float32", "float64"])
@pytest.mark.parametrize("params_dtype", ["float32", "float64"])
@pytest.mark.parametrize("train", [True, False])
def test_dtypes_are_kept_whatever_the_mixture(
    x_dtype, stats_dtype, params_dtype, train
):
    y, stats = jax.eval_shape(
        lambda x: batch_norm(
            init_params(3, params_dtype), init_stats(3, stats_dtype), x, train=train
        ),
        jax.ShapeDtypeStruct((4, 3), x_dtype),
    )
    assert y.dtype == x_dtype
    assert stats.mean.dtype == stats.var.dtype == stats_dtype


@pytest.mark.usefixtures("x64")
def test_float64_statistics_are_precise():
    x = np.random.default_rng(0).normal(1e6, 1, (8, 3))
    stats = init_stats(3, "float64")
    _, stats = batch_norm(init_params(3), stats, jnp.asarray(x), train=True, decay=0.5)
    np.testing.assert_allclose(stats.mean, x.mean(0) / 2, rtol=1e-14)
    np.testing.assert_allclose(stats.var, 0.5 + x.var(0, ddof=1) / 2, rtol=1e-9)


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("mode", ["pmap", "vmap", "checked"])
def test_correction_counts_values_on_all_devices(mode, unbiased):
    x = np.random.default_rng(1).normal(size=(4, 2, 3)).astype(np.float32)

    def new_var(x):
        return batch_norm(
            init_params(3),
            init_stats(3),
            x,
            train=True,
            decay=0.0,
            axis_name="a",
            unbiased=unbiased,
        )[1].var

    var = map_devices(mode, new_var, 4, replicated=0)(jnp.asarray(x))
    expected = np.float64(x.reshape(8, 3)).var(0, ddof=int(unbiased))
    assert_close(var, np.tile(expected, (4, 1)), 1e-6)


def test_many_steps_follow_the_recurrence():
    rng = np.random.default_rng(2)
    stats, mean, var = init_stats(2), np.zeros(2), np.ones(2)
    step = jax.jit(
        lambda stats, x: batch_norm(init_params(2), stats, x, train=True, decay=0.9)[1]
    )
    for _ in range(30):
        x = rng.normal(4, 3, (5, 2)).astype(np.float32)
        stats = step(stats, x)
        mean = 0.9 * mean + 0.1 * np.float64(x).mean(0)
        var = 0.9 * var + 0.1 * np.float64(x).var(0, ddof=1)
    assert_close(stats.mean, mean, 1e-6)
    assert_close(stats.var, var, 1e-6)


def test_inference_returns_the_statistics_themselves():
    stats = init_stats(3)
    new = batch_norm(init_params(3), stats, jnp.ones((4, 3)), train=False)[1]
    assert new is stats
