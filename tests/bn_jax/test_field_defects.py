"""Defects of other libraries, each reproduced with Flax where Flax has it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from bn_jax import (
    BatchNormParams,
    BatchStats,
    batch_norm,
    inference_affine,
    init_params,
    init_stats,
)
from tests.bn_jax.reference import (
    actual_step,
    assert_close,
    expected_step,
    lenient,
    make_problem,
)
from tests.bn_jax.sharing import MODES, shared_step

F32 = 32 * np.finfo(np.float32).eps


def flax_train(x: jax.Array, mask: Any = None, **options: Any) -> tuple[Any, Any]:
    """Flax in training from its initial variables: output and new statistics."""
    bn = linen.BatchNorm(use_running_average=False, momentum=0.0, **options)
    with lenient():
        one = jnp.zeros((1, *x.shape[1:]), x.dtype)
        start = linen.BatchNorm(use_running_average=True)
        variables = start.init(jax.random.key(0), one)
        y, new = bn.apply(variables, x, mask=mask, mutable=["batch_stats"])
    return y, new["batch_stats"]


def train(x: jax.Array, **options: Any) -> tuple[jax.Array, BatchStats]:
    n = x.shape[-1]
    return batch_norm(init_params(n), init_stats(n), x, train=True, **options)


def largest(values: jax.Array) -> float:
    return float(np.abs(np.float64(values)).max())


@pytest.mark.parametrize("mode", MODES)
def test_masked_mean_over_devices_weighs_rows_and_not_devices(mode):
    # Rows of device i are i, and 8, 4, 2, 1 of them are valid: the mean is
    # (0 + 4 + 4 + 3) / 15, while the mean of the devices' means is 6 / 4.
    x = np.repeat(np.arange(4, dtype=np.float32), 8)[:, None]
    valid = (np.arange(8) < np.array([8, 4, 2, 1])[:, None]).reshape(-1, 1)
    problem = make_problem((32, 1))._replace(x=x)
    step = shared_step(mode, problem, 4, valid, decay=0.0)
    assert_close(step.mean, np.full((4, 1), 11 / 15), F32)

    def flax_mean(x, valid):
        return flax_train(x, valid, axis_name="a")[1]["mean"]

    split = (jnp.asarray(a).reshape(4, 8, 1) for a in (x, valid))
    flax = jax.vmap(flax_mean, axis_name="a")(*split)
    assert_close(flax, np.full((4, 1), 6 / 4), F32)


@pytest.mark.parametrize("mode", MODES)
def test_a_fully_padded_device_spoils_nothing(mode):
    problem = make_problem((32, 1))
    valid = np.arange(32)[:, None] >= 8
    step = shared_step(mode, problem, 4, valid)
    assert_close(step.y, expected_step(problem, weights=valid).y, F32)

    def flax(x, valid):
        return flax_train(x, valid, axis_name="a")[0]

    split = (jnp.asarray(a).reshape(4, 8, 1) for a in (problem.x, valid))
    assert np.isnan(jax.vmap(flax, axis_name="a")(*split)).all()


@pytest.mark.parametrize("garbage", [np.nan, np.inf])
def test_garbage_in_padding_reaches_no_gradient(garbage):
    problem = make_problem((6, 3))
    valid = np.array([[1], [1], [0], [1], [1], [0]], bool)
    expected = expected_step(problem, weights=valid)
    x = np.where(valid, problem.x, np.float32(garbage))
    step = actual_step(problem._replace(x=x), weights=valid)
    assert_close(step.dx, expected.dx, F32)
    assert_close(step.dscale, expected.dscale, F32)
    assert not np.any(np.asarray(step.y)[~valid[:, 0]])

    def flax_loss(x):
        y = flax_train(x, valid)[0]
        return jnp.sum(jnp.where(valid, y * problem.dy, 0))

    y, _ = flax_train(jnp.asarray(x), valid)
    assert np.isfinite(np.asarray(y)[valid[:, 0]]).all()
    assert not np.isfinite(np.asarray(y)[~valid[:, 0]]).any()
    assert np.isnan(jax.grad(flax_loss)(jnp.asarray(x))[valid[:, 0]]).any()


@pytest.mark.parametrize(("mean", "flax_error"), [(1e3, 1e-2), (1e4, 1.0)])
def test_variance_does_not_cancel_at_a_large_mean(mean, flax_error):
    x = np.random.default_rng(0).normal(mean, 1, (4096, 8)).astype(np.float32)
    wide = np.float64(x)
    expected = (wide - wide.mean(0)) / np.sqrt(wide.var(0) + 1e-5)
    ours = largest(train(jnp.asarray(x))[0] - expected)
    flax = largest(flax_train(jnp.asarray(x), epsilon=1e-5)[0] - expected)
    assert ours <= np.spacing(np.float32(mean))
    assert flax > flax_error


def test_training_centres_before_it_scales():
    x = np.random.default_rng(0).normal(1e6, 1, (4096, 4)).astype(np.float32)
    wide = np.float64(x)
    expected = (wide - wide.mean(0)) / np.sqrt(wide.var(0) + 1e-5)
    y, batch = train(jnp.asarray(x), decay=0.0, unbiased=False)
    scale, shift = inference_affine(init_params(4), batch, eps=1e-5)
    affine = x * np.asarray(scale)[None] + np.asarray(shift)[None]
    assert largest(y - expected) <= np.spacing(np.float32(1e6))
    assert largest(affine - expected) > 1.5 * largest(y - expected)


@pytest.mark.parametrize(
    ("dtype", "mean", "std"), [("bfloat16", 7, 0.5), ("float16", 0, 300)]
)
def test_half_precision_input_has_sound_statistics(dtype, mean, std):
    x = np.random.default_rng(1).normal(mean, std, (1024, 4))
    x = jnp.asarray(x, dtype)
    wide = np.float64(x)
    y, stats = train(x, decay=0.0, unbiased=False)
    assert_close(stats.mean, wide.mean(0), F32)
    assert_close(stats.var, wide.var(0), F32)
    expected = (wide - wide.mean(0)) / np.sqrt(wide.var(0) + 1e-5)
    assert_close(y, expected, float(jnp.finfo(dtype).eps) / 2 + F32)
    # In x's own dtype, as Haiku and Equinox compute, there is no variance left.
    own = np.asarray((x * x).mean(0) - x.mean(0) ** 2, np.float64)
    assert not np.all(np.abs(own / wide.var(0) - 1) < 0.05)


def test_inference_keeps_the_precision_of_statistics():
    rng = np.random.default_rng(2)
    mean = rng.normal(0, 8, 64).astype(np.float32)
    x = jnp.asarray(mean + rng.normal(size=(512, 64)), "bfloat16")
    stats = BatchStats(jnp.asarray(mean), jnp.ones(64))
    y = batch_norm(init_params(64), stats, x, train=False, eps=1e-5)[0]
    with lenient():
        peer = nnx.BatchNorm(
            64, use_running_average=True, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
        )
        peer.mean[...], peer.var[...] = stats
        flax = peer(x)
    expected = (np.float64(x) - mean) / np.sqrt(1 + 1e-5)
    ours, theirs = (
        np.sqrt(np.mean((np.float64(a) - expected) ** 2)) for a in (y, flax)
    )
    assert ours < 0.003
    assert theirs > 5 * ours


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
def test_statistics_start_where_they_say(decay):
    # Equinox starts the variance at 1 and then divides as if it had started at 0.
    x = np.random.default_rng(3).normal(2, 1, (4096, 1)).astype(np.float32)
    _, stats = train(jnp.asarray(x), decay=decay)
    wide = np.float64(x)
    assert_close(stats.var, decay + (1 - decay) * wide.var(0, ddof=1), F32)
    assert_close(stats.mean, (1 - decay) * wide.mean(0), F32)


def test_an_empty_batch_leaves_statistics_alone():
    x = jnp.zeros((0, 3))
    y, stats = train(x)
    assert y.shape == (0, 3)
    np.testing.assert_array_equal(stats.mean, np.zeros(3))
    np.testing.assert_array_equal(stats.var, np.ones(3))
    assert np.isnan(flax_train(x)[1]["mean"]).all()


def test_one_value_per_feature_is_an_error():
    x = jnp.full((1, 3), 7.0)
    with pytest.raises(ValueError, match="more than one value per feature"):
        train(x)
    assert not np.any(flax_train(x)[0])


def test_lost_statistics_are_noticed():
    problem = make_problem((6, 3))
    with pytest.raises(ValueError, match="stats are missing"):
        batch_norm(problem.params, None, jnp.asarray(problem.x), train=True)
    bn = linen.BatchNorm(use_running_average=False, momentum=0.5)
    variables = {"params": problem.params._asdict()}
    with lenient():
        _, new = bn.apply(variables, problem.x, mutable=["batch_stats"])
    start_again = np.float64(problem.x).mean(0) / 2
    assert_close(new["batch_stats"]["mean"], start_again, F32)


def test_nonsense_settings_are_noticed():
    x = jnp.ones((6, 3))
    with pytest.raises(ValueError, match="decay must be within"):
        train(x, decay=-3)
    with pytest.raises(ValueError, match="eps must be positive"):
        train(x, eps=-1)
    assert np.isfinite(flax_train(x, epsilon=1.0)[0]).all()
    assert np.isnan(flax_train(x, epsilon=-1.0)[0]).all()


def test_a_wrong_number_of_features_is_explained():
    x = jnp.ones((6, 4))
    expected = r"params.scale has shape \(3,\), but x of shape \(6, 4\) .* has \(4,\)"
    with pytest.raises(ValueError, match=expected):
        batch_norm(init_params(3), init_stats(3), x, train=True)
    bn = linen.BatchNorm(use_running_average=True)
    variables = {
        "params": init_params(3)._asdict(),
        "batch_stats": init_stats(3)._asdict(),
    }
    with lenient(), pytest.raises(TypeError, match="incompatible shapes"):
        bn.apply(variables, x)


def test_updated_statistics_carry_no_gradient():
    problem = make_problem((6, 3))

    def ours(x):
        stats = batch_norm(*problem[:2], x, train=True)[1]
        return jnp.sum(stats.mean) + jnp.sum(stats.var)

    def flax(x):
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(flax_train(x)[1]))

    x = jnp.asarray(problem.x)
    assert not np.any(jax.grad(ours)(x))
    assert largest(jax.grad(flax)(x)) > 0.1


def test_rematerialisation_updates_statistics_once():
    problem = make_problem((6, 3))

    def loss(x):
        y, stats = batch_norm(*problem[:2], x, train=True, decay=0.5)
        return jnp.vdot(problem.dy, y), stats

    _, stats = jax.grad(jax.checkpoint(loss), has_aux=True)(jnp.asarray(problem.x))
    assert_close(stats.mean, expected_step(problem, decay=0.5).mean, F32)


def test_running_variance_is_unbiased():
    x = np.random.default_rng(4).normal(size=(4, 3)).astype(np.float32)
    _, stats = train(jnp.asarray(x), decay=0.0)
    assert_close(stats.var, np.float64(x).var(0, ddof=1), F32)
    flax = flax_train(jnp.asarray(x))[1]["var"]
    assert_close(flax, np.float64(x).var(0), F32)
    _, biased = train(jnp.asarray(x), decay=0.0, unbiased=False)
    assert_close(biased.var, flax, F32)


def test_real_valued_weights_are_more_than_a_mask():
    problem = make_problem((4, 3))
    weights = np.float32([[0.5], [1], [1.5], [1]])
    x = np.float64(problem.x)
    mean = np.average(x, axis=0, weights=weights[:, 0])
    params = BatchNormParams(None, None)
    y, stats = batch_norm(
        params,
        init_stats(3),
        jnp.asarray(problem.x),
        train=True,
        decay=0.0,
        weights=weights,
    )
    assert_close(stats.mean, mean, F32)
    var = np.average((x - mean) ** 2, axis=0, weights=weights[:, 0])
    assert_close(y, (x - mean) / np.sqrt(var + 1e-5), F32)
