"""Rounding error against float64, and against the best that Flax can do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

from bn_jax import moments
from tests.bn_jax.reference import (
    Problem,
    Step,
    actual_step,
    expected_step,
    lenient,
    make_problem,
)
from tests.bn_jax.sharing import shared_step

SHAPES = [(64, 8), (4096, 4), (8, 14, 14, 16), (32, 3)]
SEEDS = range(5)


def make_hard_problem(shape: tuple[int, ...], mean: float, seed: int) -> Problem:
    """Standard deviation 1 about a mean far from zero, and the identity after it."""
    problem = make_problem(shape, seed=seed)
    rng = np.random.default_rng(seed)
    features = shape[-1]
    ones = np.ones(features, np.float32)
    params = problem.params._replace(scale=ones, bias=0 * ones)
    x = rng.normal(mean, 1, shape).astype(np.float32)
    return problem._replace(params=params, x=x)


@jax.jit
def flax_step(problem: Problem) -> Step:
    """The same step in Flax with two passes; the statistics are left out."""
    bn = linen.BatchNorm(
        use_running_average=False, use_fast_variance=False, epsilon=1e-5
    )

    def forward(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        variables = {"params": params, "batch_stats": problem.stats._asdict()}
        return bn.apply(variables, x, mutable=["batch_stats"])[0]

    with lenient():
        y, pullback = jax.vjp(forward, problem.params._asdict(), problem.x)
        grads, dx = pullback(problem.dy)
    return Step(y, jnp.nan, jnp.nan, dx, grads["scale"], grads["bias"])


def largest_error(name: str, actual: Step, expected: Step) -> float:
    return np.abs(np.float64(getattr(actual, name)) - getattr(expected, name)).max()


@pytest.mark.parametrize("mean", [0, 300, 1e3, 1e4])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_worse_than_two_passes_of_flax(shape, mean):
    ours, flax = ({name: [] for name in ("y", "dx", "dscale")} for _ in range(2))
    # About zero both errors are that of a sum, a few units in the last place: what one
    # seed's are is chance.
    for seed in SEEDS if mean else range(40):
        problem = make_hard_problem(shape, mean, seed)
        expected = expected_step(problem)
        for errors, step in ((ours, actual_step), (flax, flax_step)):
            actual = step(problem)
            for name in errors:
                errors[name].append(largest_error(name, actual, expected))
    # Half a unit in the last place of the mean is all that is lost, at a standard
    # deviation of the sample that may be a little under 1.
    assert max(ours["y"]) <= 0.6 * np.spacing(np.float32(mean)) + 1e-6
    for name in ours:
        if mean:
            assert max(ours[name]) <= 1.01 * max(flax[name])
        else:
            assert np.mean(ours[name]) <= 1.25 * np.mean(flax[name])


@pytest.mark.parametrize(("mean", "limit"), [(0, 1e-6), (300, 2e-5), (1e4, 4e-4)])
@pytest.mark.parametrize("shape", SHAPES)
def test_error_of_the_input_gradient(shape, mean, limit):
    for seed in SEEDS:
        problem = make_hard_problem(shape, mean, seed)
        step = actual_step(problem, activation="relu")
        # The reference's mask is ours: at a kink, rounding may pick either side.
        dy = problem.dy * (np.asarray(step.y) > 0)
        expected = expected_step(problem._replace(dy=dy))
        assert np.abs(step.dx - expected.dx).max() <= limit


@pytest.mark.parametrize("mean", [0, 300, 1e3, 1e4])
@pytest.mark.parametrize("mode", ["pmap", "checked"])
def test_sharing_is_as_accurate(mode, mean):
    for seed in SEEDS:
        problem = make_hard_problem((56, 14, 8), mean, seed)
        step = shared_step(mode, problem, 4)
        error = np.abs(step.y - expected_step(problem).y).max()
        # Two roundings: each device's mean, and the mean of them.
        assert error <= 1.2 * np.spacing(np.float32(mean)) + 1e-6


@pytest.mark.parametrize("mean", [0, 300, 1e4])
@pytest.mark.parametrize("first", [0.0, 1e6, -3.0])
def test_error_where_the_first_values_are_unlike_the_rest(first, mean):
    """The shift of the variance is taken from them, and they are an eighth."""
    rng = np.random.default_rng(0)
    x = rng.normal(mean, 1, (8192, 4)).astype(np.float32)
    x[: len(x) // 8] = first
    got = jax.jit(moments)(x)
    exact = np.asarray(x, np.float64)
    # At most 7 times the variance is subtracted, at 2^-24 a rounding.
    np.testing.assert_allclose(got.var, exact.var(0), rtol=8 * 4 * 2**-24)
    spread = exact.std(0).max()
    error = np.abs(got.mean - exact.mean(0)).max()
    assert error <= np.spacing(np.float32(abs(exact.mean(0)).max())) + 1e-6 * spread


@pytest.mark.parametrize("mean", [0, 300, 1e4])
def test_error_over_many_positions(mean):
    """Where the shift is the mean of a part, the limits are those for few positions."""
    for seed in SEEDS[:2]:
        problem = make_hard_problem((16384, 4), mean, seed)
        step, expected = actual_step(problem), expected_step(problem)
        limit = 0.6 * np.spacing(np.float32(mean)) + 1e-6
        assert largest_error("y", step, expected) <= limit
