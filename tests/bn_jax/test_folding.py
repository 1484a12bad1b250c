"""The affine map of inference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax import (
    BatchNormParams,
    BatchStats,
    batch_norm,
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
    scale, shift = jax.jit(inference_affine)(params, stats)
    y = batch_norm(params, stats, x, train=False, axis=(1, 2))[0]
    assert scale.shape == shift.shape == (2, 3)
    assert_close(y, x * np.asarray(scale)[None] + np.asarray(shift)[None], 1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_has_the_dtype_of_the_statistics(dtype):
    params = BatchNormParams(jnp.ones(2, "bfloat16"), jnp.zeros(2, "bfloat16"))
    for part in inference_affine(params, init_stats(2, dtype)):
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
        inference_affine(params, stats)
