"""One device: agreement with the NumPy reference, weights, relu, inference."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax import (
    BatchNormParams,
    BatchStats,
    batch_norm,
    init_params,
    init_stats,
)
from tests.bn_jax.reference import (
    Problem,
    actual_step,
    assert_close,
    assert_steps_close,
    expected_step,
    lenient,
    make_problem,
    plain_batch_norm,
)

SHAPES = [
    ((7, 3), -1),
    ((4, 5, 3), -1),
    ((3, 4, 5, 2), -1),
    ((3, 2, 4, 5), 1),
    ((2, 3, 2, 3, 4), -1),
    ((8, 2, 3, 2), (1, 2, 3)),
    ((4, 3, 5), (2, 0)),
    ((6, 2), ()),
]
RELU = pytest.mark.parametrize("activation", [None, "relu"])

# Sums of up to a few hundred values, each off by half a unit in the last place.
F32 = 32 * np.finfo(np.float32).eps
F64 = 64 * np.finfo(np.float64).eps


def check(problem: Problem, tolerance: float = F32, **options: Any) -> None:
    assert_steps_close(
        actual_step(problem, **options), expected_step(problem, **options), tolerance
    )


@RELU
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_float32_against_the_paper(shape, axis, activation):
    problem = make_problem(shape, axis, seed=len(shape))
    check(problem, axis=axis, activation=activation, decay=0.9)


@pytest.mark.usefixtures("x64")
@RELU
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_float64_against_the_paper(shape, axis, activation):
    problem = make_problem(shape, axis, seed=len(shape), dtype=np.float64)
    check(problem, F64, axis=axis, activation=activation, decay=0.9)


@RELU
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(("shape", "axis"), SHAPES[:4])
def test_half_precision_against_the_paper(shape, axis, dtype, activation):
    problem = make_problem(shape, axis, dtype=dtype)
    options = {"axis": axis, "activation": activation}
    got, expected = actual_step(problem, **options), expected_step(problem, **options)
    assert got.y.dtype == got.dx.dtype == dtype
    # One rounding, of the result, on top of float32's.
    value_tolerance = F32 + float(jnp.finfo(dtype).eps) / 2
    assert_steps_close(got, expected, F32, value_tolerance)


@pytest.mark.parametrize("seed", range(12))
def test_random_cases_against_the_paper(seed):
    rng = np.random.default_rng(seed)
    rank = int(rng.integers(1, 5))
    shape = tuple(int(n) for n in rng.integers(2, 6, rank + 1))
    axis = int(rng.integers(-rank - 1, rank + 1))
    weights_shape = [int(rng.choice([1, n])) for n in shape]
    check(
        make_problem(shape, axis, seed=seed, mean=rng.normal() * 3),
        axis=axis,
        eps=float(rng.choice([1e-5, 1e-3, 0.3])),
        decay=float(rng.random()),
        activation=[None, "relu"][seed % 2],
        unbiased=bool(rng.integers(2)),
        weights=rng.integers(0, 4, weights_shape).astype(np.float32),
    )


def test_numbers_worked_by_hand():
    # x = 1, 2, 3, 6: mean 3, variance 3.5; with eps = 0.5 the standard deviation is 2,
    # xhat = -1, -1/2, 0, 3/2, and y = 4 xhat + 1. For dy = 1, 0, 0, 1: dbias = 2,
    # dscale = -1 + 3/2 = 1/2, dx = 4/2 (dy - (2 + xhat / 2) / 4)
    # = 2 (1 - 3/8, -7/16, -1/2, 1 - 11/16) = 5/4, -7/8, -1, 5/8.
    # With decay 1/2 from mean 1 and variance 2: mean 2, variance 1 + (14 / 3) / 2.
    problem = Problem(
        BatchNormParams(np.float32([4]), np.float32([1])),
        BatchStats(np.float32([1]), np.float32([2])),
        np.float32([[1], [2], [3], [6]]),
        np.float32([[1], [0], [0], [1]]),
    )
    step = actual_step(problem, eps=0.5, decay=0.5)
    assert_close(step.y, [[-3], [-1], [1], [7]], 1e-6)
    assert_close(step.mean, [2], 1e-6)
    assert_close(step.var, [1 + 7 / 3], 1e-6)
    assert_close(step.dx, [[5 / 4], [-7 / 8], [-1], [5 / 8]], 1e-6)
    assert_close(step.dscale, [0.5], 1e-6)
    assert_close(step.dbias, [2], 1e-6)


@pytest.mark.parametrize("without", [("scale",), ("bias",), ("scale", "bias")])
def test_missing_parameters_count_as_one_and_zero(without):
    problem = make_problem((6, 3))
    neutral = {"scale": np.ones(3, np.float32), "bias": np.zeros(3, np.float32)}
    replaced = {name: neutral[name] for name in without}
    full = actual_step(problem._replace(params=problem.params._replace(**replaced)))
    params = problem.params._replace(**dict.fromkeys(without))
    step = actual_step(problem._replace(params=params), activation=None)
    assert_close(step.y, full.y, F32)
    assert_close(step.dx, full.dx, F32)
    for name in ("scale", "bias"):
        grad = getattr(step, "d" + name)
        assert (grad is None) == (name in without)
        if grad is not None:
            assert_close(grad, getattr(full, "d" + name), F32)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gradients_have_the_dtype_of_their_values(dtype):
    problem = make_problem((6, 3))
    params = jax.tree.map(lambda p: jnp.asarray(p, dtype), problem.params)
    step = actual_step(problem._replace(params=params))
    assert step.dscale.dtype == step.dbias.dtype == dtype
    assert step.y.dtype == step.dx.dtype == step.mean.dtype == jnp.float32


WEIGHTS = {
    "rows": [[1], [0], [1], [1], [0], [1], [1]],
    "boolean": np.array([[1], [0], [1], [1], [0], [1], [1]], bool),
    "repeated": [[2], [0], [1], [3], [1], [1], [2]],
    "integers": np.array([[2], [0], [1], [3], [1], [1], [2]]),
    "per feature": np.random.default_rng(5).integers(0, 4, (7, 3)).tolist(),
    "one feature empty": [[1, 0, 1]],
    "one value": [[0], [0], [0], [1], [0], [0], [0]],
}


@RELU
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_delete_and_repeat_values(name, activation):
    weights = WEIGHTS[name]
    if isinstance(weights, list):
        weights = np.float32(weights)
    # Where one value counts, 1 / sqrt(eps) times the rounding of 0 is the gradient.
    options = {"weights": weights, "activation": activation, "decay": 0.7, "eps": 1e-3}
    check(make_problem((7, 3), seed=3), **options)


@pytest.mark.parametrize("shape", [(4, 1, 1, 1), (1, 3, 3, 1), (4, 3, 3, 2)])
def test_weights_of_images(shape):
    weights = np.random.default_rng(0).integers(0, 3, shape).astype(np.float32)
    check(make_problem((4, 3, 3, 2)), weights=weights, activation="relu")


@RELU
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_padding_may_hold_anything(garbage, dtype, activation):
    problem = make_problem((7, 3), dtype=dtype)
    weights = np.float32(WEIGHTS["repeated"])
    options = {"weights": weights, "activation": activation}
    expected = actual_step(problem, **options)
    x, dy = problem.x.copy(), problem.dy.copy()
    x[weights[:, 0] == 0] = garbage
    dy[weights[:, 0] == 0] = garbage
    got = actual_step(problem._replace(x=x, dy=dy), **options)
    for name, a, b in zip(got._fields, got, expected, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)
    assert not np.any(np.asarray(got.y)[weights[:, 0] == 0])
    assert not np.any(np.asarray(got.dx)[weights[:, 0] == 0])


@RELU
@pytest.mark.parametrize(("rows", "with_weights"), [(0, False), (0, True), (4, True)])
def test_nothing_gives_zeros_and_keeps_the_statistics(rows, with_weights, activation):
    problem = make_problem((rows, 3))
    problem = problem._replace(x=np.full_like(problem.x, np.nan))
    weights = np.zeros((rows, 1), np.float32) if with_weights else None
    step = actual_step(problem, weights=weights, activation=activation)
    assert step.y.shape == (rows, 3)
    for field in (step.y, step.dx, step.dscale, step.dbias):
        assert not np.any(field)
    np.testing.assert_array_equal(step.mean, problem.stats.mean)
    np.testing.assert_array_equal(step.var, problem.stats.var)


@pytest.mark.usefixtures("x64")
@RELU
@pytest.mark.parametrize("shape", [(6, 1), (6, 3), (1, 3), (1, 1)])
def test_gradient_of_real_weights(shape, activation):
    problem = make_problem((6, 3), dtype=np.float64)
    weights = jnp.asarray(np.random.default_rng(1).uniform(0.2, 2, shape))
    params, stats, x, dy = jax.tree.map(jnp.asarray, problem)

    def loss(params, x, weights):
        y = batch_norm(
            params, stats, x, train=True, weights=weights, activation=activation
        )[0]
        return jnp.vdot(dy, y)

    def plain_loss(params, x, weights):
        relu = activation == "relu"
        return jnp.vdot(dy, plain_batch_norm(params, x, weights=weights, relu=relu))

    got, expected = (
        jax.jit(jax.grad(f, (0, 1, 2)))(params, x, weights) for f in (loss, plain_loss)
    )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert_close(a, b, F64)
    # One weight for all of a feature's values changes nothing.
    assert (np.abs(expected[2]).max() > 0.01) == (shape[0] > 1)


@pytest.mark.usefixtures("x64")
def test_gradient_of_weights_is_zero_and_finite_at_padding():
    problem = make_problem((6, 3), dtype=np.float64)
    params, stats, x, dy = jax.tree.map(jnp.asarray, problem)
    weights = jnp.array([1.0, 0.0, 2.0, 0.5, 0.0, 1.0])[:, None]
    keep = weights[:, 0] > 0

    def loss(weights, x, dy):
        return jnp.vdot(
            dy, batch_norm(params, stats, x, train=True, weights=weights)[0]
        )

    got = jax.grad(loss)(weights, x.at[1].set(jnp.nan), dy)
    expected = jax.grad(loss)(weights[keep], x[keep], dy[keep])
    assert_close(got[keep], expected, F64)
    assert not np.any(got[~keep])


def test_relu_is_that_of_the_output():
    problem = make_problem((50, 3))
    fused = actual_step(problem, activation="relu")
    bare = actual_step(problem)
    # Two programs, in which a compiler may round the last operation otherwise.
    np.testing.assert_allclose(fused.y, np.maximum(bare.y, 0), rtol=2e-7)
    dy = problem.dy * (np.asarray(bare.y) > 0)
    after = actual_step(problem._replace(dy=dy))
    for name in ("dx", "dscale", "dbias"):
        assert_close(getattr(fused, name), getattr(after, name), F32, name)


@RELU
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(("shape", "axis"), [((6, 3), -1), ((4, 3, 5), 1)])
def test_inference_against_numpy(shape, axis, dtype, activation):
    problem = make_problem(shape, axis, dtype=dtype)
    params, stats, x, _ = problem
    y = batch_norm(
        params, stats, jnp.asarray(x), train=False, axis=axis, activation=activation
    )[0]
    (scale, bias), (mean, var) = jax.tree.map(np.float64, (params, stats))
    columns = np.moveaxis(np.float64(x), axis, -1)
    expected = scale * (columns - mean) / np.sqrt(var + 1e-5) + bias
    if activation:
        expected = np.maximum(expected, 0)
    assert y.dtype == dtype
    tolerance = F32 + float(jnp.finfo(dtype).eps) / 2
    assert_close(y, np.moveaxis(expected, -1, axis), tolerance)


def test_inference_ignores_padding():
    params, stats, x, dy = make_problem((7, 3))
    weights = np.float32(WEIGHTS["repeated"])
    keep = weights[:, 0] > 0
    padded = np.where(keep[:, None], x, np.nan)

    def loss(params, x, dy, weights=None):
        y = batch_norm(
            params, stats, x, train=False, weights=weights, activation="relu"
        )[0]
        return jnp.vdot(dy, y), y

    grad = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    (dparams, dx), y = grad(params, padded, dy, weights)
    (expected_dparams, expected_dx), expected_y = grad(params, x[keep], dy[keep])
    np.testing.assert_array_equal(y[keep], expected_y)
    np.testing.assert_array_equal(dx[keep], expected_dx)
    assert not np.any(y[~keep])
    assert not np.any(dx[~keep])
    for got, expected in zip(dparams, expected_dparams, strict=True):
        assert_close(got, expected, F32)


@pytest.mark.parametrize("train", [True, False])
def test_results_are_the_same_under_default_promotion(train):
    params, stats, x, _ = make_problem((6, 3), dtype=jnp.bfloat16)
    strict = batch_norm(params, stats, x, train=train)
    with lenient():
        default = batch_norm(params, stats, x, train=train)
    for a, b in zip(jax.tree.leaves(strict), jax.tree.leaves(default), strict=True):
        np.testing.assert_array_equal(a, b)


def test_initial_parameters_are_the_identity():
    params = init_params((2, 3), jnp.bfloat16)
    np.testing.assert_array_equal(params.scale, np.ones((2, 3)))
    np.testing.assert_array_equal(params.bias, np.zeros((2, 3)))
    assert params.scale.dtype == params.bias.dtype == jnp.bfloat16
    x = jnp.asarray(make_problem((6, 3)).x)
    y, _ = batch_norm(init_params(3), init_stats(3), x, train=False, eps=1e-12)
    np.testing.assert_array_equal(y, x)
