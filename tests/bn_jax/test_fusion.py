"""Sums and per-feature computations that are kept in, or out of, loops over memory."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax import fusion
from bn_jax.fusion import (
    computed_again,
    computed_once,
    position_mean,
    position_sums,
)
from bn_jax.layout import make_layout
from tests.bn_jax.forms import forms_of

# Large enough to be summed in parts; the last ones small, odd, or without any parts.
CASES = [
    ((32, 14, 14, 16), -1),
    ((32, 16, 14, 14), 1),
    ((30, 31, 100), (0, 2)),
    ((1, 96, 96, 8), -1),
    ((16, 8192), 0),
    ((8192, 16), -1),
    ((64, 40, 40), (1, 2)),
    ((37, 2003), -1),
    ((3, 5, 7), -1),
    ((0, 4), -1),
    ((70000,), 0),
]


def values(shape: tuple[int, ...], seed: int = 0) -> jax.Array:
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(1, 1, shape), jnp.float32)


@pytest.mark.parametrize(("shape", "axis"), CASES)
def test_sums(shape, axis):
    layout = make_layout(shape, axis)
    x, y = values(shape), values(shape, 1)
    sums = jax.jit(functools.partial(position_sums, layout))(x, y, x * y)
    for actual, array in zip(sums, (x, y, x * y), strict=True):
        expected = np.sum(np.asarray(array, np.float64), layout.position_axes)
        assert actual.dtype == jnp.float32
        assert actual.shape == expected.shape
        np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize(("shape", "axis"), CASES)
def test_sums_of_all_positions_together(shape, axis):
    layout = make_layout(shape, axis)
    x, y = values(shape), values(shape, 1)
    sums = jax.jit(functools.partial(fusion._sum_together, layout))(x, y)
    for actual, array in zip(sums, (x, y), strict=True):
        # A CPU adds them up one after another, which a GPU does not.
        expected = np.sum(np.asarray(array, np.float64), layout.position_axes)
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("shape", "axis"), CASES)
@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_mean(platform, shape, axis):
    layout = make_layout(shape, axis)
    x = values(shape)
    with forms_of(platform):
        mean = jax.jit(functools.partial(position_mean, layout))(x)
    array = np.asarray(x, np.float64)
    expected = array.sum(layout.position_axes) / max(layout.num_positions, 1)
    np.testing.assert_allclose(mean, expected, rtol=1e-5, atol=1e-6)


def test_parts_are_as_accurate_as_the_library():
    shape = (32, 56, 56, 8)
    layout = make_layout(shape, -1)
    x = values(shape)
    exact = np.sum(np.asarray(x, np.float64), layout.position_axes)
    errors = [
        np.abs(jax.jit(functools.partial(sums, layout))(x)[0] / exact - 1).max()
        for sums in (fusion._sum_parts, fusion._sum)
    ]
    assert errors[0] <= 2 * errors[1] + 2e-7


def test_derivatives_and_batches():
    shape = (32, 14, 14, 16)
    layout = make_layout(shape, -1)
    x, tangent = values(shape), values(shape, 1)

    def loss(x):
        total, square = position_sums(layout, x, x * x)
        return jnp.sum(jnp.sin(total) + square)

    def plain(x):
        return jnp.sum(jnp.sin(x.sum((0, 1, 2))) + (x * x).sum((0, 1, 2)))

    gradient, expected = jax.grad(loss)(x), jax.grad(plain)(x)
    np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=2e-3)
    _, forward = jax.jvp(loss, (x,), (tangent,))
    np.testing.assert_allclose(forward, jnp.vdot(gradient, tangent), rtol=1e-3)
    batch = jnp.stack([x, tangent])
    both = jax.vmap(functools.partial(position_sums, layout))(batch)[0]
    for row, array in zip(both, batch, strict=True):
        np.testing.assert_allclose(row, array.sum((0, 1, 2)), rtol=1e-5)


def test_computed_values_are_not_written_to_memory():
    shape = (32, 56, 56, 16)
    layout = make_layout(shape, -1)
    x = values(shape).astype(jnp.bfloat16)

    def sums(function, x):
        centred = x.astype(jnp.float32) - 1
        return function(layout, centred, centred * centred)

    def temporary_bytes(function):
        lowered = jax.jit(functools.partial(sums, function)).lower(x)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    # An eighth of two arrays of float32; plain sums need a whole one and more.
    assert temporary_bytes(position_sums) <= 1.1 * x.size / 8 * 2 * 4
    assert temporary_bytes(fusion._sum) >= x.size * 4


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("function", [computed_once, computed_again])
def test_nothing_is_changed(function, platform, number):
    arrays = [values((8,), seed) for seed in range(number)]
    with forms_of(platform):
        found = jax.jit(function)(*arrays)
    for actual, expected in zip(found, arrays, strict=True):
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(
    ("platform", "barriers"), [("cuda", 2), ("cpu", 0), ("tpu", 0)]
)
def test_on_gpu_each_call_yields_other_arrays(platform, barriers):
    def twice(scale):
        first = computed_again(scale)
        second = computed_again(*first)
        return jnp.sin(first[0]), jnp.sin(second[0])

    traced = jax.jit(twice).trace(values((8,)))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.optimization_barrier") == barriers


def test_computed_once_stays_out_of_the_loop():
    x, var = values((64, 64, 16)), values((16,)) ** 2

    def normalise(keep_out, x, var):
        scale, shift = keep_out(var * 3 + 1, var * 5)
        return x * scale[None, None] + shift[None, None]

    def multiplications(keep_out):
        lowered = jax.jit(functools.partial(normalise, keep_out)).lower(x, var)
        # The fused computation whose result is as large as x.
        (loop,) = re.findall(
            r"^%fused_computation[^\n]*-> f32\[64,64,16\] \{(.*?)^\}",
            lowered.compile().as_text(),
            re.MULTILINE | re.DOTALL,
        )
        return loop.count(" multiply(")

    assert multiplications(computed_once) == 1
    assert multiplications(lambda *arrays: arrays) == 3
