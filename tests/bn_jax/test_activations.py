"""Fused activations are the ones of `jax.nn`, and keep nothing more."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax import BatchNormParams, batch_norm
from bn_jax.activations import ACTIVATIONS
from tests.bn_jax.reference import (
    assert_close,
    enable_x64,
    make_problem,
    plain_batch_norm,
)

F32 = 64 * np.finfo(np.float32).eps
EACH = pytest.mark.parametrize("name", ACTIVATIONS)
SHAPES = [(64, 3), (8, 5, 5, 4)]


@EACH
@pytest.mark.parametrize("with_weights", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_step_against_autodiff_in_float64(name, shape, with_weights):
    problem = make_problem(shape)
    weights = np.ones((shape[0],) + (1,) * (len(shape) - 1), np.float32)
    weights[::3] = 2
    with enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), problem)
        counts = jnp.asarray(weights if with_weights else 1.0, jnp.float64)

        def expected(params, x):
            plain = plain_batch_norm(params, x, weights=counts)
            return getattr(jax.nn, name)(plain)

        y, pullback = jax.vjp(expected, wide.params, wide.x)
        want = (y, *pullback(wide.dy))

    def fused(params, x):
        used = weights if with_weights else None
        return batch_norm(
            params, problem.stats, x, train=True, weights=used, activation=name
        )[0]

    y, pullback = jax.vjp(fused, problem.params, jnp.asarray(problem.x))
    got = (y, *pullback(jnp.asarray(problem.dy)))
    for actual, wanted in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_close(actual, wanted, F32)


@EACH
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_only_x_is_kept(name, dtype):
    params, stats, x, _ = jax.tree.map(
        jnp.asarray, make_problem((16, 8, 4), dtype=dtype)
    )

    def fused(params: BatchNormParams, x: jax.Array) -> jax.Array:
        return batch_norm(params, stats, x, train=True, activation=name)[0]

    kept = jax.tree.leaves(jax.vjp(fused, params, x)[1])
    assert [str(a.dtype) for a in kept if a.size >= x.size] == [str(jnp.dtype(dtype))]


@EACH
def test_inference_and_its_derivatives(name):
    params, stats, x, tangent = jax.tree.map(jnp.asarray, make_problem((16, 4)))

    def fused(x):
        return batch_norm(params, stats, x, train=False, activation=name)[0]

    def apart(x):
        y, _ = batch_norm(params, stats, x, train=False)
        return getattr(jax.nn, name)(y)

    got = jax.jvp(fused, (x,), (tangent,))
    for actual, want in zip(got, jax.jvp(apart, (x,), (tangent,)), strict=True):
        assert_close(actual, want, F32)


@EACH
def test_padding_stays_out(name):
    params, stats, x, dy = make_problem((9, 3))
    x[::3] = np.nan
    weights = np.ones((9, 1), np.float32)
    weights[::3] = 0

    def fused(x):
        return batch_norm(
            params, stats, x, train=True, weights=weights, activation=name
        )[0]

    y, pullback = jax.vjp(fused, jnp.asarray(x))
    (dx,) = pullback(jnp.asarray(dy))
    for array in (y, dx):
        assert np.all(np.isfinite(array))
        assert not np.any(array[::3])
