"""Haiku's cases for its BatchNorm, put to our linen module.

Written anew from the public test of Haiku (haiku/_src/batch_norm_test.py): same inputs,
same expectations, but where a test says otherwise and why.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax.linen import BatchNorm

KEY = jax.random.key(42)
# Haiku's average of one batch is that batch's: it corrects for its start at 0.
FORGETFUL = {"momentum": 0.0, "unbiased": False}
PLAIN = {"use_scale": False, "use_bias": False}


def train(module, x, variables=None):
    variables = variables or module.init(KEY, x, use_running_average=False)
    y, updated = module.apply(
        variables, x, use_running_average=False, mutable=["batch_stats"]
    )
    return y, variables | updated


def test_basic():
    x = jnp.arange(2 * 3 * 4, dtype=jnp.float32).reshape(2, 3, 4)
    module = BatchNorm(**FORGETFUL)
    y, variables = train(module, x)
    np.testing.assert_allclose(y, np.broadcast_to(y[:, :, :1], y.shape), rtol=1e-6)
    inference = module.apply(variables, x, use_running_average=True)
    np.testing.assert_allclose(inference, y, rtol=2e-2)


@pytest.mark.parametrize(("shape", "axis"), [((2, 3, 3, 5), -1), ((2, 5, 3, 3), 1)])
def test_simple_training(shape, axis):
    module = BatchNorm(axis=axis)
    params = {"scale": jnp.full(5, 0.5), "bias": jnp.full(5, 2.0)}
    x = np.ones(shape, np.float32)
    stats = module.init(KEY, x, use_running_average=False)["batch_stats"]
    y, _ = train(module, x, {"params": params, "batch_stats": stats})
    np.testing.assert_array_equal(y, np.full(shape, 2.0))


def test_simple_training_normalized_axes():
    x = np.stack([np.full((5, 3, 3), 2.0), np.ones((5, 3, 3))], 1).astype(np.float32)
    y, _ = train(BatchNorm(axis=1, **PLAIN), x)
    np.testing.assert_array_equal(y, np.zeros(x.shape))


@pytest.mark.parametrize("group", [8, 2])
def test_simple_training_cross_replica_axis(group):
    x = np.arange(8 * 4, dtype=np.float32).reshape(8, 4)
    groups = np.arange(8).reshape(-1, group).tolist()
    module = BatchNorm(
        axis_name="i",
        axis_index_groups=groups if group < 8 else None,
        epsilon=1e-10,
        **PLAIN,
    )
    # One example a device, and so no axis of examples: shape (4,).
    y = jax.pmap(lambda x: train(module, x)[0], axis_name="i")(x)
    grouped = x.reshape(-1, group, 4)
    expected = (grouped - grouped.mean(1, keepdims=True)) / grouped.std(
        1, keepdims=True
    )
    np.testing.assert_array_almost_equal(y, expected.reshape(x.shape), decimal=5)


def test_vmap_cross_replica_axis():
    x = jax.random.normal(KEY, (4, 32, 32, 3))
    module = BatchNorm(axis_name="i", **FORGETFUL)
    variables = module.init(KEY, x[0], use_running_average=False)
    y, new = jax.vmap(
        lambda x: train(module, x, variables), axis_name="i", out_axes=(0, None)
    )(x)
    rows = np.asarray(x)
    mean, var = rows.mean((0, 1, 2)), rows.var((0, 1, 2))
    expected = (rows - mean) / np.sqrt(var + 1e-5)
    np.testing.assert_array_almost_equal(y, expected, decimal=4)
    inference = module.apply(new, x, use_running_average=True)
    np.testing.assert_array_almost_equal(inference, expected, decimal=4)


def test_no_scale_and_offset():
    x = np.ones((2, 5, 3, 3, 3), np.float32)
    y, variables = train(BatchNorm(**PLAIN), x)
    np.testing.assert_array_equal(y, np.zeros_like(x))
    assert "params" not in variables


def test_eps_cast_to_var_dtype():
    x = jnp.ones((2, 1), jnp.bfloat16)
    module = BatchNorm(epsilon=0.1, param_dtype=jnp.bfloat16)
    variables = jax.device_get(module.init(KEY, x, use_running_average=True))
    y = module.apply(variables, x, use_running_average=True)
    assert y.dtype == jnp.bfloat16


def test_no_type_promotion():
    x = np.random.default_rng(0).normal(size=(100, 5)).astype(np.float32)
    y, variables = train(BatchNorm(), x)
    assert y.dtype == jnp.float32
    half = jnp.asarray(x, jnp.bfloat16)
    evaluation = BatchNorm(dtype=jnp.bfloat16, use_running_average=True)
    assert evaluation.apply(variables, half).dtype == jnp.bfloat16


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_statistics_stay_finite(dtype):
    # Haiku's state is in the input's dtype: NaN from the first step on N(7, 0.5) in
    # bfloat16, and outputs of 0 in float16 for a deviation of 300.
    random = np.random.default_rng(0)
    mean, std = (7, 0.5) if dtype == jnp.bfloat16 else (0, 300)
    x = jnp.asarray(mean + std * random.normal(size=(256, 4)), dtype)
    y, variables = train(BatchNorm(dtype=dtype, **FORGETFUL), x)
    np.testing.assert_allclose(np.float32(y).std(0), 1, rtol=0.01)
    np.testing.assert_allclose(
        variables["batch_stats"]["var"], np.var(np.float64(x), axis=0), rtol=1e-4
    )
