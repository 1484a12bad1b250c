"""Each platform gets its own form, and what is in a form does what it is there for."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax import forms
from bn_jax.forms import CPU, GPU, TPU
from bn_jax.layout import make_layout

EACH_FORM = pytest.mark.parametrize("form", [CPU, GPU, TPU], ids=["cpu", "gpu", "tpu"])
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")

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


def lowered(function, platform, *arguments):
    """The program for a platform, which need not be here, before it is compiled."""
    traced = jax.jit(function).trace(*arguments)
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_program_has_its_platforms_form_alone(platform):
    factors = {CPU: 3.0, GPU: 5.0, TPU: 7.0}
    expected = {"cpu": 3.0, "cuda": 5.0, "rocm": 5.0, "tpu": 7.0}[platform]

    def scaled(x):
        return forms.run(lambda form, x: x * factors[form], x)

    text = lowered(scaled, platform, 1.0)
    for factor in factors.values():
        assert (f"dense<{factor}" in text) == (factor == expected)


def test_each_form_is_traced_once():
    traced = []

    def one_pass(form, x):
        traced.append(form)
        return x

    jax.jit(functools.partial(forms.run, one_pass)).trace(1.0)
    assert sorted(map(id, traced)) == sorted(map(id, (CPU, GPU, TPU)))


def test_a_trace_for_one_platform_leaves_nothing_behind():
    factors = {CPU: 3.0, GPU: 5.0, TPU: 7.0}

    def step(x):
        return forms.run(lambda form, x: form.hide(x) * factors[form], x)

    step = jax.jit(step)
    before = step.trace(1.0).lower(lowering_platforms=("cpu",)).as_text()
    step.trace(1.0).lower(lowering_platforms=("cuda",))
    step.trace(1.0).lower(lowering_platforms=("tpu",))
    assert step.trace(1.0).lower(lowering_platforms=("cpu",)).as_text() == before


@EACH_FORM
@pytest.mark.parametrize(("shape", "axis"), CASES)
def test_sums(form, shape, axis):
    layout = make_layout(shape, axis)
    x, y = values(shape), values(shape, 1)
    sums = jax.jit(functools.partial(form.sums, layout))(x, y, x * y)
    # A CPU adds up one after another what a GPU does not.
    tolerance = 1e-4 if form is GPU else 1e-6
    for actual, array in zip(sums, (x, y, x * y), strict=True):
        expected = np.sum(np.asarray(array, np.float64), layout.position_axes)
        assert actual.dtype == jnp.float32
        assert actual.shape == expected.shape
        np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=1e-3)


@EACH_FORM
@pytest.mark.parametrize(("shape", "axis"), CASES[:-2])
def test_the_sample_is_a_share_of_the_positions(form, shape, axis):
    layout = make_layout(shape, axis)
    position = np.arange(np.prod(shape)).reshape(shape)
    sample = np.asarray(form.sample(layout, position))
    assert np.isin(sample, position).all()
    assert sample.size == np.unique(sample).size
    share = sample.size / position.size
    every = 32 if form is GPU else 8
    assert share >= 1 / every
    # A few rows of a short axis can be more; of few positions, all are taken.
    positions = sample.size // max(np.prod(layout.feature_shape, dtype=int), 1)
    assert share <= 4 / every or positions <= 2 * forms.MIN_SAMPLE


def test_parts_are_as_accurate_as_the_library():
    shape = (32, 56, 56, 8)
    layout = make_layout(shape, -1)
    x = values(shape)
    exact = np.sum(np.asarray(x, np.float64), layout.position_axes)
    errors = [
        np.abs(jax.jit(functools.partial(form.sums, layout))(x)[0] / exact - 1).max()
        for form in (CPU, TPU)
    ]
    assert errors[0] <= 2 * errors[1] + 2e-7


@EACH_FORM
def test_derivatives_and_batches_of_sums(form):
    shape = (32, 14, 14, 16)
    layout = make_layout(shape, -1)
    x, tangent = values(shape), values(shape, 1)

    def loss(x):
        total, square = form.sums(layout, x, x * x)
        return jnp.sum(jnp.sin(total * 1e-3) + square)

    def plain(x):
        return jnp.sum(jnp.sin(x.sum((0, 1, 2)) * 1e-3) + (x * x).sum((0, 1, 2)))

    gradient, expected = jax.grad(loss)(x), jax.grad(plain)(x)
    np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=2e-3)
    _, forward = jax.jvp(loss, (x,), (tangent,))
    np.testing.assert_allclose(forward, jnp.vdot(gradient, tangent), rtol=1e-3)
    batch = jnp.stack([x, tangent])
    both = jax.vmap(functools.partial(form.sums, layout))(batch)[0]
    for row, array in zip(both, batch, strict=True):
        np.testing.assert_allclose(row, array.sum((0, 1, 2)), rtol=1e-4)


def test_on_cpu_what_is_summed_is_not_written_to_memory():
    shape = (32, 56, 56, 16)
    layout = make_layout(shape, -1)
    x = values(shape).astype(jnp.bfloat16)

    def temporary_bytes(form):
        def sums(x):
            centred = x.astype(jnp.float32) - 1
            return form.sums(layout, centred, centred * centred)

        memory = jax.jit(sums).lower(x).compile().memory_analysis()
        return memory.temp_size_in_bytes

    # An eighth of two arrays of float32; plain sums need a whole one and more.
    assert temporary_bytes(CPU) <= 1.1 * x.size / 8 * 2 * 4
    assert temporary_bytes(TPU) >= x.size * 4


@EACH_FORM
@pytest.mark.parametrize("function", ["hoist", "hide"])
def test_hoisting_and_hiding_change_nothing(form, function):
    table = values((3, 8))
    found = jax.jit(getattr(form, function))(table)
    np.testing.assert_array_equal(found, table)


def test_on_gpu_each_pass_sees_another_table():
    def twice(form, table):
        first = form.hide(table)
        return jnp.sin(first), jnp.sin(form.hide(first))

    for form, barriers in ((GPU, 2), (CPU, 0), (TPU, 0)):
        text = lowered(functools.partial(twice, form), "cpu", values((3, 8)))
        assert text.count("stablehlo.optimization_barrier") == barriers


def test_on_cpu_what_is_hoisted_stays_out_of_the_loop():
    x, var = values((64, 64, 16)), values((16,)) ** 2

    def normalise(form, x, var):
        scale, shift = form.hoist(jnp.stack([var * 3 + 1, var * 5]))
        return x * scale[None, None] + shift[None, None]

    def multiplications(form):
        program = jax.jit(functools.partial(normalise, form)).lower(x, var).compile()
        # The fused computation whose result is as large as x.
        (loop,) = re.findall(
            r"^%fused_computation[^\n]*-> f32\[64,64,16\] \{(.*?)^\}",
            program.as_text(),
            re.MULTILINE | re.DOTALL,
        )
        return loop.count(" multiply(")

    assert multiplications(CPU) == 1
    assert multiplications(TPU) == 3
