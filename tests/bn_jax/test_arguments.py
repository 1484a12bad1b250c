"""Errors of arguments: at trace time, saying what was got and what to do."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax import BatchNormParams, BatchStats, batch_norm, init_params, init_stats


def trace(x: Any = None, params: Any = None, stats: Any = "fit", **options: Any) -> Any:
    """Traces a call, and runs nothing."""
    x = jax.ShapeDtypeStruct((8, 3), jnp.float32) if x is None else x
    params = init_params(3) if params is None else params
    stats = init_stats(3) if isinstance(stats, str) else stats
    options = {"train": True} | options
    return jax.eval_shape(lambda x: batch_norm(params, stats, x, **options), x)


def both_modes(test):
    return pytest.mark.parametrize("train", [True, False])(test)


def test_the_defaults_are_fine():
    y, stats = trace()
    assert y.shape == (8, 3)
    assert stats.mean.shape == (3,)


@both_modes
@pytest.mark.parametrize("eps", [0, 0.0, -1, -1e-3, float("nan"), float("inf")])
def test_eps_must_be_positive(eps, train):
    with pytest.raises(ValueError, match=rf"eps must be positive, got {eps}.*1e-5"):
        trace(eps=eps, train=train)


@both_modes
@pytest.mark.parametrize("eps", ["1e-3", None, [1e-3]])
def test_eps_must_be_a_number(eps, train):
    name = type(eps).__name__
    with pytest.raises(TypeError, match=f"eps must be a number .* got {name}.*float"):
        trace(eps=eps, train=train)


def test_eps_must_not_be_traced():
    with pytest.raises(TypeError, match="eps must be a number known when tracing"):
        jax.jit(lambda eps: trace(eps=eps))(1e-3)


@both_modes
@pytest.mark.parametrize("eps", [np.float32(1e-3), np.float64(1e-3), 1])
def test_eps_may_be_any_number(eps, train):
    trace(eps=eps, train=train)


@both_modes
@pytest.mark.parametrize("decay", [-0.01, 1.01, -3, float("nan")])
def test_decay_must_be_within_zero_and_one(decay, train):
    expected = rf"decay must be within \[0, 1\], got {decay}.*decay \* old"
    with pytest.raises(ValueError, match=expected):
        trace(decay=decay, train=train)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decay_of_an_array_is_checked_while_tracing_too(dtype):
    with pytest.raises(ValueError, match=r"decay must be within \[0, 1\], got 2"):
        trace(decay=jnp.asarray(2, dtype))
    trace(decay=jnp.float32(0.5))


@pytest.mark.parametrize("decay", ["0.9", None])
def test_decay_must_be_a_number(decay):
    name = type(decay).__name__
    with pytest.raises(TypeError, match=f"decay must be a number, got {name}"):
        trace(decay=decay)


@both_modes
def test_activation_must_be_known(train):
    expected = r"activation must be one of \(None, 'relu', .*got 'tanh'.*apply others"
    with pytest.raises(ValueError, match=expected):
        trace(activation="tanh", train=train)


@both_modes
@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool"])
def test_x_must_be_floating_point(dtype, train):
    x = jax.ShapeDtypeStruct((8, 3), dtype)
    expected = f"x must be floating point, got {dtype}.*x.astype"
    with pytest.raises(TypeError, match=expected):
        trace(x, train=train)


@both_modes
def test_axis_must_be_in_range(train):
    with pytest.raises(ValueError, match=r"axis 2 is out of range .*\(8, 3\)"):
        trace(axis=2, train=train)


@both_modes
@pytest.mark.parametrize("shape", [(8, 4), (3, 8), (8, 3, 1)])
def test_params_must_fit_x(shape, train):
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    features = rf"\({shape[-1]},\)"
    expected = rf"params.scale has shape \(3,\), but x of shape .* has {features};"
    with pytest.raises(ValueError, match=expected):
        trace(x, stats=init_stats(shape[-1]), train=train)


@both_modes
def test_bias_must_fit_x(train):
    with pytest.raises(ValueError, match=r"params.bias has shape \(1,\)"):
        trace(params=BatchNormParams(jnp.ones(3), jnp.ones(1)), train=train)


@both_modes
@pytest.mark.parametrize("field", ["mean", "var"])
def test_stats_must_fit_x(field, train):
    stats = init_stats(3)._replace(**{field: jnp.ones(4)})
    expected = rf"stats.{field} has shape \(4,\).*another axis"
    with pytest.raises(ValueError, match=expected):
        trace(stats=stats, train=train)


@both_modes
def test_stats_must_not_be_missing(train):
    with pytest.raises(ValueError, match=r"stats are missing \(None\).*init_stats"):
        trace(stats=None, train=train)


@both_modes
@pytest.mark.parametrize("stats", [{}, (1, 2), jnp.ones(3), init_params(3)])
def test_stats_must_be_batch_stats(stats, train):
    expected = r"stats must be BatchStats\(mean, var\), got .*init_stats"
    with pytest.raises(TypeError, match=expected):
        trace(stats=stats, train=train)


@both_modes
@pytest.mark.parametrize("params", [{"scale": 1, "bias": 0}, (1, 2), init_stats(3)])
def test_params_must_be_batch_norm_params(params, train):
    expected = r"params must be BatchNormParams\(scale, bias\), got .*init_params"
    with pytest.raises(TypeError, match=expected):
        trace(params=params, train=train)


@both_modes
def test_params_and_stats_must_be_floating_point(train):
    with pytest.raises(
        TypeError, match=r"params.scale must be floating point, got int"
    ):
        trace(params=init_params(3, jnp.int32), train=train)
    with pytest.raises(
        TypeError, match=r"stats.mean must be floating point, got int32"
    ):
        trace(stats=init_stats(3, jnp.int32), train=train)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_coarse_statistics_are_for_inference_only(dtype):
    expected = f"stats.mean is {dtype}, too coarse for a moving average.*float32"
    with pytest.raises(TypeError, match=expected):
        trace(stats=init_stats(3, dtype))
    trace(stats=init_stats(3, dtype), train=False)


@pytest.mark.parametrize(("shape", "axis"), [((1, 3), -1), ((1, 3, 1, 1), 1)])
def test_one_value_per_feature_in_training(shape, axis):
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    expected = r"more than one value per feature.*1 device\(s\).*larger batch"
    with pytest.raises(ValueError, match=expected):
        trace(x, axis=axis)
    trace(x, axis=axis, train=False)


def test_one_value_on_each_of_several_devices_is_enough():
    def train(x: jax.Array) -> tuple[jax.Array, BatchStats]:
        return batch_norm(init_params(3), init_stats(3), x, train=True, axis_name="a")

    y, _ = jax.eval_shape(jax.vmap(train, axis_name="a"), jnp.ones((4, 1, 3)))
    assert y.shape == (4, 1, 3)


@both_modes
@pytest.mark.parametrize("shape", [(8,), (3,), (8, 2), (1, 8, 1)])
def test_weights_must_fit_x(shape, train):
    expected = rf"weights of shape \({shape[0]}.*do not fit x .*\(8, 1\) for one weight"
    with pytest.raises(ValueError, match=expected):
        trace(weights=jnp.ones(shape), train=train)


def test_an_unknown_mapped_axis_is_named():
    with pytest.raises(NameError, match="unbound axis name: devices"):
        trace(axis_name="devices")


def test_errors_come_while_tracing_under_jit():
    step = jax.jit(lambda x: batch_norm(init_params(3), init_stats(3), x, train=True))
    with pytest.raises(ValueError, match=r"params.scale has shape"):
        step.trace(jax.ShapeDtypeStruct((8, 5), jnp.float32))
