"""The affine map of inference, and folding it into one layer."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax import (
    BatchNormParams,
    BatchStats,
    batch_norm,
    fold_conv,
    fold_dense,
    inference_affine,
    init_params,
    init_stats,
)
from tests.bn_jax.reference import assert_close, make_problem


def test_numbers_worked_by_hand():
    # var + eps = 4, so scale = 6 / 2 = 3 and shift = 1 - 5 * 3 = -14.
    params = BatchNormParams(jnp.array([6.0]), jnp.array([1.0]))
    stats = BatchStats(jnp.array([5.0]), jnp.array([3.5]))
    scale, shift = inference_affine(params, stats, eps=0.5)
    assert_close(scale, [3], 1e-7)
    assert_close(shift, [-14], 1e-7)


@pytest.mark.parametrize("without", [(), ("scale",), ("bias",), ("scale", "bias")])
def test_same_map_as_inference(without):
    params, stats, x, _ = make_problem((6, 4))
    params = params._replace(**dict.fromkeys(without))
    scale, shift = inference_affine(params, stats, eps=1e-2)
    y = batch_norm(params, stats, x, train=False, eps=1e-2)[0]
    assert_close(y, x * np.asarray(scale)[None] + np.asarray(shift)[None], 1e-6)


def test_several_feature_axes():
    params, stats, x, _ = make_problem((5, 2, 3), (1, 2))
    scale, shift = jax.jit(functools.partial(inference_affine, eps=1e-3))(params, stats)
    y = batch_norm(params, stats, x, train=False, axis=(1, 2), eps=1e-3)[0]
    assert scale.shape == shift.shape == (2, 3)
    assert_close(y, x * np.asarray(scale)[None] + np.asarray(shift)[None], 1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_has_the_dtype_of_the_statistics(dtype):
    params = BatchNormParams(jnp.ones(2, "bfloat16"), jnp.zeros(2, "bfloat16"))
    for part in inference_affine(params, init_stats(2, dtype), eps=1e-3):
        assert part.dtype == dtype


@pytest.mark.parametrize("eps", [0, -1e-3, float("nan"), float("inf")])
def test_eps_must_be_positive(eps):
    params, stats, *_ = make_problem((2, 3))
    with pytest.raises(ValueError, match="eps must be positive, got"):
        inference_affine(params, stats, eps=eps)


@pytest.mark.parametrize(
    ("params", "stats", "error", "message"),
    [
        (init_params(3), None, ValueError, "stats are missing"),
        (init_params(3), BatchStats(None, None), ValueError, "stats are missing"),
        (init_params(3), {"mean": 0, "var": 1}, TypeError, "must be BatchStats"),
        (None, init_stats(3), TypeError, "must be BatchNormParams"),
        (
            init_params(4),
            init_stats(3),
            ValueError,
            r"\(4,\), but stats.var has \(3,\)",
        ),
        (init_params(3), init_stats(3, int), TypeError, "must be floating point"),
        (
            init_params(3),
            init_stats(3)._replace(mean=jnp.zeros(1)),
            ValueError,
            r"stats.mean has shape \(1,\)",
        ),
    ],
)
def test_bad_arguments(params, stats, error, message):
    with pytest.raises(error, match=message):
        inference_affine(params, stats, eps=1e-3)


def normalised(y: np.ndarray, params: BatchNormParams, stats: BatchStats) -> np.ndarray:
    """Algorithm 2's map in float64."""
    scale, bias, mean, var = (np.float64(a) for a in (*params, *stats))
    return (y - mean) / np.sqrt(var + 1e-3) * scale + bias


@pytest.mark.parametrize("with_bias", [True, False])
def test_fold_dense(with_bias):
    params, stats, *_ = make_problem((2, 4))
    x, kernel, bias = draw(5, 3), draw(3, 4), draw(4) if with_bias else None
    y = np.float64(x) @ kernel + (bias if with_bias else 0)
    folded, shift = fold_dense(kernel, bias, params, stats, eps=1e-3)
    got = x @ np.asarray(folded) + np.asarray(shift)
    assert_close(got, normalised(y, params, stats), 1e-6)


def convolve(
    x: jax.Array, kernel: jax.Array, groups: int = 1, padding: str = "SAME"
) -> np.ndarray:
    space = "DHW"[3 - (kernel.ndim - 2) :]
    y = jax.lax.conv_general_dilated(
        jnp.asarray(x),
        jnp.asarray(kernel),
        [1] * len(space),
        padding,
        dimension_numbers=(f"N{space}C", f"{space}IO", f"N{space}C"),
        feature_group_count=groups,
        precision="highest",
    )
    return np.asarray(y)


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


each_bias = pytest.mark.parametrize("with_bias", [True, False])
each_grouping = pytest.mark.parametrize("groups", [1, 2, 4])
each_window = pytest.mark.parametrize("positions", [(3,), (3, 2), (2, 2, 2)])


@each_bias
@each_grouping
@each_window
def test_fold_conv(positions, groups, with_bias):
    params, stats, *_ = make_problem((2, 8))
    x = draw(2, *[5] * len(positions), 4)
    kernel = draw(*positions, 4 // groups, 8)
    bias = draw(8) if with_bias else None
    y = convolve(x, kernel, groups) + (bias if with_bias else 0)
    folded, shift = fold_conv(kernel, bias, params, stats, eps=1e-3)
    got = convolve(x, folded, groups) + np.asarray(shift)
    assert_close(got, normalised(y, params, stats), 1e-6)


@each_bias
@each_grouping
@each_window
def test_fold_conv_after_the_normalisation(positions, groups, with_bias):
    params, stats, *_ = make_problem((2, 4))
    x = draw(2, *[5] * len(positions), 4)
    kernel = draw(*positions, 4 // groups, 8)
    bias = draw(8) if with_bias else None
    normal = np.float32(normalised(x, params, stats))
    expected = convolve(normal, kernel, groups, "VALID") + (bias if with_bias else 0)
    folded, shift = fold_conv(kernel, bias, params, stats, eps=1e-3, norm_first=True)
    got = convolve(x, folded, groups, "VALID") + np.asarray(shift)
    assert_close(got, expected, 3e-6)


@each_bias
def test_fold_dense_after_the_normalisation(with_bias):
    params, stats, *_ = make_problem((2, 3))
    x, kernel, bias = draw(5, 3), draw(3, 4), draw(4) if with_bias else None
    expected = normalised(x, params, stats) @ kernel + (bias if with_bias else 0)
    folded, shift = fold_dense(kernel, bias, params, stats, eps=1e-3, norm_first=True)
    assert_close(x @ np.asarray(folded) + np.asarray(shift), expected, 1e-6)


@pytest.mark.parametrize("transpose_kernel", [True, False])
def test_fold_transposed_conv(transpose_kernel):
    params, stats, *_ = make_problem((2, 6))
    x, bias = draw(2, 5, 5, 4), draw(6)
    kernel = draw(3, 2, *((6, 4) if transpose_kernel else (4, 6)))

    def up(kernel: jax.Array) -> np.ndarray:
        y = jax.lax.conv_transpose(
            jnp.asarray(x),
            jnp.asarray(kernel),
            (2, 2),
            "SAME",
            transpose_kernel=transpose_kernel,
            precision="highest",
        )
        return np.asarray(y)

    folded, shift = fold_conv(
        kernel, bias, params, stats, eps=1e-3, transpose_kernel=transpose_kernel
    )
    expected = normalised(up(kernel) + bias, params, stats)
    assert_close(up(folded) + np.asarray(shift), expected, 1e-6)


@pytest.mark.parametrize("function", [inference_affine, fold_dense, fold_conv])
def test_eps_has_no_default(function):
    assert inspect.signature(function).parameters["eps"].default is inspect._empty


def test_fold_by_hand():
    # As above: scale 3 and shift -14; the bias of 2 becomes 2 * 3 - 14.
    params = BatchNormParams(jnp.array([6.0]), jnp.array([1.0]))
    stats = BatchStats(jnp.array([5.0]), jnp.array([3.5]))
    kernel, bias = jnp.array([[7.0]]), jnp.array([2.0])
    folded, shift = fold_dense(kernel, bias, params, stats, eps=0.5)
    assert_close(folded, [[21]], 1e-6)
    assert_close(shift, [-8], 1e-6)


def test_folded_layer_has_the_dtype_of_the_kernel():
    params, stats, *_ = make_problem((2, 4))
    for array in fold_dense(
        jnp.ones((3, 4), "bfloat16"), None, params, stats, eps=1e-3
    ):
        assert array.dtype == "bfloat16"


first_dense = functools.partial(fold_dense, norm_first=True)
first_conv = functools.partial(fold_conv, norm_first=True)


@pytest.mark.parametrize(
    ("fold", "kernel", "bias", "error", "message"),
    [
        (fold_dense, (3, 3, 2, 4), None, ValueError, "fold_conv takes convolutions"),
        (fold_dense, (4,), None, ValueError, r"expected \(inputs, features\)"),
        (fold_conv, (2, 4), None, ValueError, "fold_dense takes dense layers"),
        (fold_dense, (3, 5), None, ValueError, r"\(4,\), but kernel .* has \(5,\)"),
        (fold_conv, (3, 2, 5), None, ValueError, r"\(4,\), but kernel .* has \(5,\)"),
        (fold_dense, (3, 4), (3,), ValueError, r"bias has features of shape \(3,\)"),
        (first_dense, (3, 5), None, ValueError, r"\(4,\), but kernel .* has \(3,\)"),
        (first_conv, (3, 3, 6), None, ValueError, r"\(4,\), but kernel .* has \(3,\)"),
        (first_conv, (3, 5, 6), None, ValueError, r"\(4,\), but kernel .* has \(0,\)"),
        (first_conv, (3, 2, 5), None, ValueError, "2 groups .* cannot share"),
        (first_conv, (3, 2, 6), (3,), ValueError, r"bias has features of shape \(3,\)"),
        (fold_dense, (3, 4), (), ValueError, r"bias has features of shape \(\)"),
    ],
)
def test_layers_that_do_not_fit(fold, kernel, bias, error, message):
    params, stats, *_ = make_problem((2, 4))
    bias = None if bias is None else jnp.zeros(bias)
    with pytest.raises(error, match=message):
        fold(jnp.ones(kernel), bias, params, stats, eps=1e-3)


def test_integer_kernels_and_missing_statistics():
    params, stats, *_ = make_problem((2, 4))
    with pytest.raises(TypeError, match="must be floating point"):
        fold_dense(jnp.ones((3, 4), int), None, params, stats, eps=1e-3)
    with pytest.raises(ValueError, match="stats are missing"):
        fold_dense(jnp.ones((3, 4)), None, params, None, eps=1e-3)
    with pytest.raises(ValueError, match="eps must be positive"):
        fold_conv(jnp.ones((1, 3, 4)), None, params, stats, eps=0)
