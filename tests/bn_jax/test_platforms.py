"""Each platform gets its own form, and all forms compute the same."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax import batch_norm, ghost_batch_norm
from bn_jax.platforms import by_platform
from tests.bn_jax.forms import forms_of
from tests.bn_jax.reference import (
    actual_step,
    assert_steps_close,
    expected_step,
    lenient,
    make_problem,
)
from tests.bn_jax.sharing import MODES, shared_step

NAMES = ("cpu", "cuda", "rocm", "tpu")


def lowered(function, platform, *arguments):
    """The program for a platform, which need not be here, before it is compiled."""
    traced = jax.jit(function).trace(*arguments)
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("platform", NAMES)
def test_a_program_has_its_platforms_form_alone(platform):
    forms = {
        "cpu": functools.partial(jnp.multiply, 3.0),
        "gpu": functools.partial(jnp.multiply, 5.0),
        "tpu": functools.partial(jnp.multiply, 7.0),
    }
    factors = {"cpu": 3, "cuda": 5, "rocm": 5, "tpu": 7}

    def scaled(x):
        return by_platform(x, default=functools.partial(jnp.multiply, 11.0), **forms)

    text = lowered(scaled, platform, 1.0)
    for factor in (3, 5, 7, 11):
        number = f"dense<{factor}.0"
        assert (number in text) == (factor == factors[platform])


def test_the_default_is_for_platforms_without_a_form():
    def scaled(x):
        return by_platform(x, default=lambda x: 3 * x, tpu=lambda x: 5 * x)

    assert jax.jit(scaled)(2.0) == 6
    assert scaled(2.0) == 6
    assert "dense<5.0" in lowered(scaled, "tpu", 1.0)


def test_within_a_form_nothing_is_chosen_again():
    traced = []

    def inner(name, x):
        traced.append(name)
        return x + 1

    def outer(x):
        forms = {name: functools.partial(inner, name) for name in ("cpu", "gpu", "tpu")}
        return by_platform(x, default=functools.partial(inner, "default"), **forms)

    def nested(x):
        return by_platform(x, default=outer, gpu=outer)

    jax.jit(nested).trace(1.0)
    # As the default every form is needed, on a GPU, of two names, that of GPUs alone.
    assert sorted(traced) == sorted(
        ["gpu"] * 2 + ["cpu", "gpu", "gpu", "tpu", "default"]
    )
    assert jax.jit(nested)(1.0) == 2


@pytest.mark.parametrize(
    ("platform", "hides", "chooses"),
    [("cpu", True, False), ("cuda", True, False), ("tpu", False, True)],
)
def test_what_a_training_step_is_lowered_to(platform, hides, chooses):
    problem = make_problem((8, 4))

    def loss(params, stats, x):
        y, _ = batch_norm(params, stats, x, train=True, activation="relu")
        return jnp.sum(y**2)

    text = lowered(jax.grad(loss), platform, *problem[:3])
    assert ("stablehlo.optimization_barrier" in text) == hides
    # What the choice between two ways to the moments is made by.
    assert ("dense<8.750000e-01>" in text) == chooses


@pytest.fixture(params=["gpu", "tpu"])
def other_forms(request: pytest.FixtureRequest) -> Iterator[None]:
    with forms_of(request.param):
        yield


@pytest.mark.usefixtures("other_forms")
class TestOtherForms:
    # About a large mean, rounding may pick either side of a kink.
    @pytest.mark.parametrize(
        ("activation", "mean"), [(None, 0.5), (None, 1e4), ("relu", 0.5)]
    )
    @pytest.mark.parametrize("with_weights", [False, True])
    @pytest.mark.parametrize(("shape", "axis"), [((64, 3), -1), ((4, 6, 5, 3), 1)])
    def test_step(self, shape, axis, activation, with_weights, mean):
        problem = make_problem(shape, axis, mean=mean)
        options = {"axis": axis, "activation": activation}
        if with_weights:
            x = np.array(problem.x)
            weights = np.ones((shape[0],) + (1,) * (len(shape) - 1), np.float32)
            weights[::3] = 0
            expected = expected_step(problem, weights=weights, **options)
            x[::3] = np.nan
            problem = problem._replace(x=x)
            options["weights"] = weights
        else:
            expected = expected_step(problem, **options)
        # Half a unit in the last place of the mean, relative to the deviation.
        tolerance = 2e-5 + np.spacing(np.float32(mean))
        assert_steps_close(actual_step(problem, **options), expected, tolerance)

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("mean", [0.5, 1e4])
    def test_sharing(self, mode, mean):
        problem = make_problem((16, 3), mean=mean)
        step = shared_step(mode, problem, 4)
        for field in (step.mean, step.var):
            np.testing.assert_array_equal(field, np.tile(field[:1], (4, 1)))
        step = step._replace(mean=step.mean[0], var=step.var[0])
        tolerance = 2e-5 + 2 * np.spacing(np.float32(mean))
        assert_steps_close(step, expected_step(problem), tolerance)

    def test_nothing_but_padding(self):
        params, stats, x, _ = make_problem((6, 3))
        weights = jnp.zeros((6, 1))
        y, new = batch_norm(params, stats, x, train=True, weights=weights)
        np.testing.assert_array_equal(y, np.zeros_like(x))
        np.testing.assert_array_equal(new.mean, stats.mean)
        np.testing.assert_array_equal(new.var, stats.var)

    def test_ghost_batches(self):
        params, stats, x, _ = make_problem((8, 3))
        ghost = functools.partial(ghost_batch_norm, train=True, virtual_batch_size=4)
        y, _ = jax.jit(ghost)(params, stats, x)
        for part in (slice(0, 4), slice(4, 8)):
            own, _ = batch_norm(params, stats, x[part], train=True)
            np.testing.assert_allclose(y[part], own, rtol=1e-5, atol=1e-6)

    def test_second_derivatives(self):
        params, stats, x, _ = make_problem((5, 2))

        def loss(x):
            with lenient():
                y, _ = batch_norm(params, stats, x, train=True, activation="relu")
                return jnp.sum(y**3)

        x = jnp.asarray(x)
        tangent = jnp.cos(x)
        _, actual = jax.jvp(jax.grad(loss), (x,), (tangent,))
        step = 1e-2
        expected = (
            jax.grad(loss)(x + step * tangent) - jax.grad(loss)(x - step * tangent)
        ) / (2 * step)
        np.testing.assert_allclose(actual, expected, rtol=2e-2, atol=2e-3)
