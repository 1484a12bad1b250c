"""Flax's own cases for its BatchNorm, for linen and nnx, put to our modules.

Written anew from the public tests of Flax (tests/linen/linen_test.py and
tests/nnx/nn/normalization_test.py): same inputs, same expectations, but where a test
says otherwise and why.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bn_jax.linen
import bn_jax.nnx

KEY = jax.random.key(0)


def normal_input(shape=(4, 3, 2), masked=False):
    key, mask_key, _ = jax.random.split(KEY, 3)
    x = jax.random.normal(key, shape)
    if not masked:
        return x, None
    mask = jax.random.randint(mask_key, (4, 3, 1), 0, 2, jnp.int32).astype(bool)
    return jnp.where(mask, x, jnp.nan), mask


@pytest.mark.parametrize("masked", [False, True])
def test_batch_norm(masked):
    x, mask = normal_input(masked=masked)
    model = bn_jax.linen.BatchNorm(
        momentum=0.9, use_running_average=False, unbiased=False
    )
    y, variables = model.init_with_output(KEY, x, mask=mask)
    np.testing.assert_allclose(y.mean((0, 1), where=mask), np.zeros(2), atol=1e-4)
    np.testing.assert_allclose(y.var((0, 1), where=mask), np.ones(2), rtol=1e-4)

    y, updated = model.apply(variables, x, mutable=["batch_stats"], mask=mask)
    stats = updated["batch_stats"]
    mean, var = x.mean((0, 1), where=mask), x.var((0, 1), where=mask)
    np.testing.assert_allclose(stats["mean"], 0.1 * mean, atol=1e-4)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * var, rtol=1e-4)
    # The input is NaN where it is masked; the output of Flax is, too.
    assert np.all(np.isfinite(y))


def test_batch_norm_unbiased():
    # Flax's variance of a small batch is too small: m is 12 here.
    x, _ = normal_input()
    model = bn_jax.linen.BatchNorm(momentum=0.9, use_running_average=False)
    variables = model.init(KEY, x)
    _, updated = model.apply(variables, x, mutable=["batch_stats"])
    np.testing.assert_allclose(
        updated["batch_stats"]["var"], 0.9 + 0.1 * x.var((0, 1), ddof=1), rtol=1e-4
    )


def test_batch_norm_complex():
    # Flax takes complex input; the core is for real input, and says so.
    x = jnp.ones((4, 3, 2), jnp.complex64)
    with pytest.raises(TypeError, match="must be floating point, got complex64"):
        bn_jax.linen.BatchNorm(use_running_average=False).init(KEY, x)


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
        norm = bn_jax.linen.BatchNorm(
            name="norm", use_running_average=False, axis_name="batch"
        )
        x = norm(x)
        return x, norm(x)


def test_batch_norm_multi_init():
    x = jax.random.normal(jax.random.key(1), (2, 4))
    (first, second), variables = Twice().init_with_output(KEY, x)
    np.testing.assert_allclose(first, second, rtol=0.005)
    assert set(variables["params"]) == {"norm"}


def test_batch_norm_multi_init_of_one_example():
    variables = Twice().init(KEY, jnp.ones(10))
    assert variables["batch_stats"]["norm"]["mean"].shape == (10,)


class LinenModel(nn.Module):
    options: dict

    def setup(self):
        self.norm_layer = bn_jax.linen.BatchNorm(
            use_running_average=False, **self.options
        )
        dtypes = {key: self.options[key] for key in ("dtype", "param_dtype")}
        self.linear = nn.Dense(4, **dtypes)

    def __call__(self, x, *, mask=None):
        return self.linear(self.norm_layer(x, mask=mask))


class NnxModel(nnx.Module):
    def __init__(self, options, rngs):
        self.norm_layer = bn_jax.nnx.BatchNorm(
            5, use_running_average=False, rngs=rngs, **options
        )
        dtypes = {key: options[key] for key in ("dtype", "param_dtype")}
        self.linear = nnx.Linear(5, 4, rngs=rngs, **dtypes)

    def __call__(self, x, *, mask=None):
        return self.linear(self.norm_layer(x, mask=mask))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.float16])
@pytest.mark.parametrize("use_fast_variance", [True, False])
@pytest.mark.parametrize("mask", [None, np.array([True, False, True, False, True])])
def test_nnx_linen_batchnorm_equivalence(dtype, param_dtype, use_fast_variance, mask):
    options = {
        "dtype": dtype,
        "param_dtype": param_dtype,
        "use_fast_variance": use_fast_variance,
    }
    x = jax.random.normal(KEY, (10, 5))
    linen_model = LinenModel(options)
    variables = linen_model.init(jax.random.key(1), x)
    linen_y, updated = linen_model.apply(
        variables, x, mask=mask, mutable=["batch_stats"]
    )
    nnx_model = NnxModel(options, nnx.Rngs(42))
    for name in ("kernel", "bias"):
        getattr(nnx_model.linear, name)[...] = variables["params"]["linear"][name]
    nnx_y = nnx_model(x, mask=mask)
    np.testing.assert_array_equal(linen_y, nnx_y)
    # Features that the mask leaves no value of: 0, and NaN with Flax.
    assert np.all(np.isfinite(nnx_y))
    for name, values in updated["batch_stats"]["norm_layer"].items():
        found = getattr(nnx_model.norm_layer, name)[...]
        np.testing.assert_array_equal(found, values)
    if mask is not None:
        assert np.all(nnx_model.norm_layer.mean[...][~mask] == 0)
        assert np.all(nnx_model.norm_layer.var[...][~mask] == 1)


def test_the_docstrings_of_flax():
    # flax.linen.BatchNorm and flax.nnx.BatchNorm show these uses.
    x = jax.random.normal(KEY, (5, 6))
    model = bn_jax.linen.BatchNorm(momentum=0.9, epsilon=1e-5, dtype=jnp.float32)
    variables = model.init(jax.random.key(1), x, use_running_average=False)
    assert jax.tree.map(jnp.shape, variables) == {
        "batch_stats": {"mean": (6,), "var": (6,)},
        "params": {"bias": (6,), "scale": (6,)},
    }
    y, stats = model.apply(
        variables, x, mutable=["batch_stats"], use_running_average=False
    )
    assert not np.allclose(stats["batch_stats"]["mean"], 0)
    _, kept = model.apply(
        variables, x, mutable=["batch_stats"], use_running_average=True
    )
    np.testing.assert_array_equal(kept["batch_stats"]["mean"], np.zeros(6))

    layer = bn_jax.nnx.BatchNorm(num_features=6, momentum=0.9, rngs=nnx.Rngs(0))
    layer.train()
    np.testing.assert_array_equal(layer(x), y)
    first = np.asarray(layer.mean[...])
    layer(x)
    second = np.asarray(layer.mean[...])
    assert np.all(first != second)
    layer.eval()
    layer(x)
    np.testing.assert_array_equal(layer.mean[...], second)
