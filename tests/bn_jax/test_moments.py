"""Count, mean and variance, and merging them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax import Moments, merge_moments, moments
from tests.bn_jax.reference import assert_close

F32 = 16 * np.finfo(np.float32).eps


def assert_moments_close(actual: Moments, expected: Moments, tolerance: float) -> None:
    for name, got, want in zip(Moments._fields, actual, expected, strict=True):
        assert_close(got, want, tolerance, name)


def of_rows(rows: np.ndarray) -> Moments:
    rows = np.float64(rows)
    count = np.full(rows.shape[1:], float(len(rows)))
    return Moments(count, rows.mean(0), rows.var(0))


def test_numbers_worked_by_hand():
    # Column 1: 1, 2, 3, 6: sum 12, mean 3, deviations -2, -1, 0, 3, squares 4 + 1 + 0
    # + 9 = 14, variance 14 / 4 = 3.5. Column 2: 0, 0, 0, 4: mean 1, variance (1 + 1 +
    # 1 + 9) / 4 = 3.
    x = jnp.array([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [6.0, 4.0]])
    count, mean, var = moments(x)
    np.testing.assert_array_equal(count, [4, 4])
    np.testing.assert_array_equal(mean, [3, 1])
    np.testing.assert_array_equal(var, [3.5, 3])


@pytest.mark.parametrize(
    ("shape", "axis", "reduced"),
    [
        ((7, 3), -1, (0,)),
        ((2, 3, 4, 5), 1, (0, 2, 3)),
        ((6, 2, 3), (1, 2), (0,)),
        ((6, 2, 3), (), (0, 1, 2)),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_against_numpy(shape, axis, reduced, seed):
    x = np.random.default_rng(seed).normal(3, 2, shape).astype(np.float32)
    wide = x.astype(np.float64)
    mean, var = wide.mean(reduced), wide.var(reduced)
    count = np.full(mean.shape, x.size / mean.size)
    expected = Moments(count, mean, var)
    assert_moments_close(moments(jnp.asarray(x), axis=axis), expected, F32)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("float16", "float32"), ("bfloat16", "float32"), ("float32", "float32")],
)
def test_statistics_are_float32(dtype, expected):
    got = moments(jnp.ones((4, 2), dtype), weights=jnp.ones((4, 1), dtype))
    assert {str(field.dtype) for field in got} == {expected}


@pytest.mark.usefixtures("x64")
def test_float64_input_has_float64_moments():
    x = np.random.default_rng(0).normal(1e6, 1, (50, 3))
    got = moments(jnp.asarray(x))
    assert {str(field.dtype) for field in got} == {"float64"}
    assert_moments_close(got, of_rows(x), 1e-14)


@pytest.mark.parametrize("value", [0.1, -7.3, 1e4 / 3, 12345.67])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_constant_has_variance_zero(value, dtype):
    var = moments(jnp.full((1000, 1), value, dtype)).var
    size = float(jnp.asarray(value, dtype))
    # Rounding of the mean is what is left, squared.
    assert 0 <= var[0] <= (np.finfo(np.float32).eps * size) ** 2


@pytest.mark.parametrize("mean", [1e3, 1e4, 1e5])
@pytest.mark.parametrize("rows", [4096, 1568, 97])
@pytest.mark.parametrize("transform", [jax.jit, lambda function: function])
def test_large_mean_is_rounded_once(mean, rows, transform):
    x = np.random.default_rng(1).normal(mean, 1, (rows, 4)).astype(np.float32)
    got, expected = transform(moments)(jnp.asarray(x)), of_rows(x)
    half_a_unit = np.spacing(np.float32(mean)) / 2
    assert np.abs(np.float64(got.mean) - expected.mean).max() <= half_a_unit * 1.01
    np.testing.assert_allclose(got.var, expected.var, rtol=F32)


def test_weights_repeat_and_delete_values():
    x = np.random.default_rng(2).normal(size=(6, 3)).astype(np.float32)
    x[1] = np.nan
    times = np.array([1, 0, 3, 2, 0, 1])
    got = moments(jnp.asarray(x), weights=jnp.asarray(times)[:, None])
    assert_moments_close(got, of_rows(np.repeat(x, times, axis=0)), F32)


def test_weights_may_differ_between_features():
    x = np.random.default_rng(3).normal(size=(8, 2)).astype(np.float32)
    keep = np.random.default_rng(4).random((8, 2)) < 0.6
    got = moments(jnp.asarray(x), weights=jnp.asarray(keep))
    columns = [of_rows(x[keep[:, i], i : i + 1]) for i in range(2)]
    expected = Moments(*(np.concatenate(f) for f in zip(*columns, strict=True)))
    assert_moments_close(got, expected, F32)


def test_real_weights_against_numpy_average():
    x = np.random.default_rng(5).normal(9, 2, (10, 4)).astype(np.float32)
    w = np.random.default_rng(6).random((10, 1)).astype(np.float32)
    mean = np.average(np.float64(x), axis=0, weights=w[:, 0])
    var = np.average((x - mean) ** 2, axis=0, weights=w[:, 0])
    expected = Moments(np.full(4, w.sum(dtype=np.float64)), mean, var)
    assert_moments_close(moments(jnp.asarray(x), weights=w), expected, F32)


@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_has_moments_zero(rows):
    x = jnp.full((rows, 2), jnp.nan)
    got = moments(x, weights=jnp.zeros((rows, 1)))
    for field in got:
        np.testing.assert_array_equal(field, [0, 0])


@pytest.mark.parametrize("sizes", [(4, 4), (1, 7, 2), (5,), (0, 3, 0), (1, 1, 1, 1)])
@pytest.mark.parametrize("seed", range(2))
def test_merging_is_concatenating(sizes, seed):
    rng = np.random.default_rng(seed)
    parts = [
        rng.normal(1e4 + i, 1, (n, 3)).astype(np.float32) for i, n in enumerate(sizes)
    ]
    got = merge_moments(*(moments(jnp.asarray(part)) for part in parts))
    expected = of_rows(np.concatenate(parts))
    np.testing.assert_array_equal(got.count, expected.count)
    np.testing.assert_allclose(got.mean, expected.mean, rtol=1.5e-7)
    # The parts' means are rounded to float32: half a unit of 1e4 is 5e-4.
    np.testing.assert_allclose(got.var, expected.var, rtol=2e-3, atol=1e-6)


def test_merging_nothing_with_nothing():
    nothing = Moments(jnp.zeros(2), jnp.zeros(2), jnp.zeros(2))
    for field in merge_moments(nothing, nothing):
        np.testing.assert_array_equal(field, [0, 0])


def test_merging_by_hand():
    # {1, 3} has mean 2 and variance 1; {6} has mean 6. Together: mean 10 / 3, and
    # variance (49 + 1 + 64) / 9 / 3 = 38 / 9.
    one = Moments(jnp.array([2.0]), jnp.array([2.0]), jnp.array([1.0]))
    other = Moments(jnp.array([1.0]), jnp.array([6.0]), jnp.array([0.0]))
    expected = Moments(np.array([3]), np.array([10 / 3]), np.array([38 / 9]))
    assert_moments_close(merge_moments(one, other), expected, F32)
    assert_moments_close(merge_moments(other, one), expected, F32)


def test_merging_is_associative():
    x = jnp.asarray(np.random.default_rng(7).normal(size=(9, 3)), jnp.float32)
    a, b, c = (moments(part) for part in (x[:2], x[2:3], x[3:]))
    left = merge_moments(merge_moments(a, b), c)
    assert_moments_close(left, merge_moments(a, merge_moments(b, c)), F32)
    assert_moments_close(left, merge_moments(a, b, c), F32)


def test_moments_over_a_mapped_axis():
    x = np.random.default_rng(8).normal(1e4, 1, (4, 5, 3)).astype(np.float32)
    share = functools.partial(moments, axis_name="i")
    got = jax.vmap(share, axis_name="i")(jnp.asarray(x))
    expected = of_rows(x.reshape(20, 3))
    for device in range(4):
        np.testing.assert_array_equal(got.count[device], expected.count)
        np.testing.assert_allclose(got.mean[device], expected.mean, rtol=1.5e-7)
        np.testing.assert_allclose(got.var[device], expected.var, rtol=2e-3)


def test_merging_needs_parts_of_one_shape():
    a, b = moments(jnp.ones((2, 3))), moments(jnp.ones((2, 4)))
    with pytest.raises(ValueError, match=r"one shape, got 2 with shapes .*3.*4"):
        merge_moments(a, b)
    with pytest.raises(ValueError, match=r"one or more Moments .* got 0"):
        merge_moments()


@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool", "complex64"])
def test_x_must_be_floating_point(dtype):
    with pytest.raises(TypeError, match=rf"x must be floating point, got {dtype}"):
        moments(jnp.ones((2, 3), dtype))


@pytest.mark.parametrize("shape", [(8,), (8, 2), (4, 1), (8, 1, 1), ()])
def test_weights_must_fit_x(shape):
    expected = r"do not fit x of shape \(8, 3\).*for example \(8, 1\)"
    with pytest.raises(ValueError, match=expected):
        jax.eval_shape(lambda x: moments(x, weights=jnp.ones(shape)), jnp.ones((8, 3)))
