"""Batch renormalisation against its paper, in NumPy float64."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax import BatchNormParams, batch_norm, batch_renorm
from tests.bn_jax.reference import (
    Problem,
    Step,
    as_step,
    assert_close,
    assert_steps_close,
    expected_step,
    make_problem,
)
from tests.bn_jax.sharing import MODES, map_devices

F32 = 32 * np.finfo(np.float32).eps
LIMITS = [(1.0, 0.0), (1.5, 0.25), (3.0, 5.0), (np.inf, np.inf)]


def renorm_step(problem: Problem, weights: Any = None, **options: Any) -> Step:
    """One training step with its gradients."""

    @jax.jit
    def step(problem: Problem, weights: Any) -> Step:
        return step_of(problem.params, problem.stats, *map(jnp.asarray, problem[2:]))

    def step_of(params, stats, x, dy):
        return device_step(params, stats, x, dy, weights, **options)

    return step(problem, weights)


def device_step(params, stats, x, dy, weights=None, **options):
    def forward(params, x):
        return batch_renorm(params, stats, x, train=True, weights=weights, **options)

    y, pullback, new = jax.vjp(forward, params, x, has_aux=True)
    return as_step(y, new, pullback(dy.astype(y.dtype)))


def ioffe_step(
    problem: Problem,
    r_max: float,
    d_max: float,
    *,
    eps: float = 1e-5,
    relu: bool = False,
    rows: np.ndarray | None = None,
) -> Step:
    """Ioffe 2017, section 3: the transform and its gradients, of (m, features).

    `rows` are the indices of the rows that count; the others get zeros. The statistics
    are left to `expected_step`, since they are batch normalisation's.
    """
    (gamma, beta), old, all_x, all_dy = jax.tree.map(np.float64, problem)
    rows = np.arange(len(all_x)) if rows is None else rows
    x, dy = all_x[rows], all_dy[rows]
    m = len(x)
    mu = x.mean(0)
    sigma = np.sqrt(((x - mu) ** 2).mean(0) + eps)
    sigma_old = np.sqrt(old.var + eps)
    r = np.clip(sigma / sigma_old, 1 / r_max, r_max)
    d = np.clip((mu - old.mean) / sigma_old, -d_max, d_max)
    xhat = (x - mu) / sigma * r + d
    y = gamma * xhat + beta
    if relu:
        dy = dy * (y > 0)
        y = np.maximum(y, 0)
    dxhat = dy * gamma
    dsigma = (dxhat * (x - mu) * -r / sigma**2).sum(0)
    dmu = (dxhat * -r / sigma).sum(0)
    dx = dxhat * r / sigma + dsigma * (x - mu) / (m * sigma) + dmu / m
    full_y, full_dx = np.zeros((2, *all_x.shape))
    full_y[rows], full_dx[rows] = y, dx
    counts = np.isin(np.arange(len(all_x)), rows)[:, None]
    after = expected_step(problem, eps=eps, weights=counts)
    return Step(full_y, after.mean, after.var, full_dx, (dy * xhat).sum(0), dy.sum(0))


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize(("r_max", "d_max"), LIMITS)
def test_against_its_paper(r_max, d_max, activation):
    problem = make_problem((6, 40), seed=1)
    got = renorm_step(problem, r_max=r_max, d_max=d_max, activation=activation)
    expected = ioffe_step(problem, r_max, d_max, relu=activation == "relu")
    assert_steps_close(got, expected, F32)


def test_the_cases_cover_clipping_on_both_sides_and_none():
    x = np.float64(make_problem((6, 40), seed=1).x)
    stats = make_problem((6, 40), seed=1).stats
    r = np.sqrt(x.var(0) / stats.var)
    d = (x.mean(0) - stats.mean) / np.sqrt(stats.var)
    for condition in (r > 1.5, r < 1 / 1.5, abs(np.log(r)) < 0.4):
        assert condition.any()
    for condition in (d > 0.25, d < -0.25, abs(d) < 0.25):
        assert condition.any()


@pytest.mark.usefixtures("x64")
def test_against_its_paper_in_float64():
    problem = make_problem((6, 4), seed=2, dtype=np.float64)
    expected = ioffe_step(problem, 1.5, 0.25)
    assert_steps_close(renorm_step(problem, r_max=1.5, d_max=0.25), expected, 1e-13)


def test_numbers_worked_by_hand():
    # x = 1, 3: mean 2; eps = 3 and variance 1 give a deviation of 2, xhat = -1/2, 1/2.
    # Statistics of mean 1 and variance 13: deviation 4, r = 2/4, d = 1/4.
    # y = 8 (xhat r + d) + 1 = 1 and 5, which is 8 (x - 1) / 4 + 1.
    params = BatchNormParams(jnp.array([8.0]), jnp.array([1.0]))
    stats = make_problem((2, 1)).stats._replace(
        mean=jnp.array([1.0]), var=jnp.array([13.0])
    )
    x = jnp.array([[1.0], [3.0]])
    renorm = functools.partial(batch_renorm, params, stats, x, train=True, eps=3.0)
    assert_close(renorm(r_max=2.0, d_max=0.25)[0], [[1], [5]], 1e-6)
    # r is clipped to 1 / 1.6 = 5/8: y = 8 (-+5/16 + 1/4) + 1.
    assert_close(renorm(r_max=1.6, d_max=0.25)[0], [[0.5], [5.5]], 1e-6)
    # d is clipped to 1/8, a step in y of 1 downwards.
    assert_close(renorm(r_max=2.0, d_max=0.125)[0], [[0], [4]], 1e-6)


@pytest.mark.parametrize("shape_axis", [((4, 3, 2, 5), 1), ((5, 2, 3), (1, 2))])
def test_without_room_it_is_batch_norm(shape_axis):
    shape, axis = shape_axis
    problem = make_problem(shape, axis)
    got = renorm_step(problem, r_max=1, d_max=0, axis=axis)
    assert_steps_close(got, expected_step(problem, axis=axis), F32)


def test_within_the_limits_it_is_inference():
    params, stats, x, _ = make_problem((6, 3))
    wide = {"r_max": np.inf, "d_max": np.inf}
    y, _ = batch_renorm(params, stats, x, train=True, **wide)
    assert_close(y, batch_norm(params, stats, x, train=False)[0], F32)


def test_inference_is_batch_norm():
    params, stats, x, _ = make_problem((6, 3))
    got = batch_renorm(params, stats, x, train=False, r_max=2, d_max=1, eps=0.1)
    expected = batch_norm(params, stats, x, train=False, eps=0.1)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize("without", [("scale",), ("bias",), ("scale", "bias")])
def test_missing_parameters_count_as_one_and_zero(without):
    problem = make_problem((6, 3))
    neutral = {"scale": jnp.ones(3), "bias": jnp.zeros(3)}
    present = problem._replace(
        params=problem.params._replace(**{name: neutral[name] for name in without})
    )
    absent = problem.params._replace(**dict.fromkeys(without))
    y, _ = batch_renorm(
        absent, problem.stats, problem.x, train=True, r_max=1.5, d_max=0.25
    )
    assert_close(y, ioffe_step(present, 1.5, 0.25).y, F32)


def test_padding_is_deleted():
    problem = make_problem((6, 40), seed=1)
    rows = np.array([0, 2, 5])
    weights = np.isin(np.arange(6), rows)[:, None].astype(np.float32)
    padded = problem._replace(x=np.where(weights == 0, np.nan, problem.x))
    got = renorm_step(padded, weights, r_max=1.5, d_max=0.25)
    assert_steps_close(got, ioffe_step(problem, 1.5, 0.25, rows=rows), F32)


def test_padding_alone_changes_nothing():
    problem = make_problem((6, 3))
    nothing = problem._replace(x=np.full((6, 3), np.nan, np.float32))
    got = renorm_step(nothing, np.zeros((6, 1), np.float32), r_max=3, d_max=5)
    for field in (got.y, got.dx, got.dscale, got.dbias):
        assert not np.any(field)
    np.testing.assert_array_equal(got.mean, problem.stats.mean)
    np.testing.assert_array_equal(got.var, problem.stats.var)


def test_no_gradient_through_the_corrections_or_statistics():
    params, stats, x, _ = make_problem((6, 3))

    def loss(stats, r_max, d_max):
        y, new = batch_renorm(params, stats, x, train=True, r_max=r_max, d_max=d_max)
        return jnp.sum(y**2) + sum(jnp.sum(field) for field in new)

    for field in jax.tree.leaves(jax.grad(loss, (0, 1, 2))(stats, 1.1, 0.1)):
        assert not np.any(field)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_rounds_once(dtype):
    problem = make_problem((6, 4), dtype=dtype)
    got = renorm_step(problem, r_max=1.5, d_max=0.25)
    assert got.y.dtype == got.dx.dtype == dtype
    expected = ioffe_step(problem, 1.5, 0.25)
    half = float(jnp.finfo(dtype).eps) / 2
    assert_steps_close(got, expected, F32, F32 + half)


def test_a_schedule_of_limits_compiles_once():
    params, stats, x, _ = make_problem((6, 3))
    traces = []

    @jax.jit
    def train(r_max, d_max):
        traces.append(1)
        return batch_renorm(params, stats, x, train=True, r_max=r_max, d_max=d_max)[0]

    for r_max, d_max in ((1.0, 0.0), (2.0, 1.0), (3.0, 5.0)):
        expected = ioffe_step(make_problem((6, 3)), r_max, d_max).y
        assert_close(train(r_max, d_max), expected, F32)
    assert len(traces) == 1


@pytest.mark.parametrize("mode", MODES)
def test_sharing_is_concatenating(mode):
    problem = make_problem((24, 3), seed=3)
    step = functools.partial(device_step, axis_name="a", r_max=1.2, d_max=0.2)
    weights = np.arange(6)[None] < np.array([6, 1, 0, 3])[:, None]
    rows = np.flatnonzero(weights.ravel())
    weights = weights.reshape(4, 6, 1).astype(np.float32)
    split = (jnp.asarray(a).reshape(4, 6, 3) for a in (problem.x, problem.dy))
    got = map_devices(mode, step, 4, replicated=2)(*problem[:2], *split, weights)
    total = (lambda a: a[0]) if mode == "checked" else (lambda a: a.sum(0))
    got = Step(
        np.reshape(got.y, (24, 3)),
        got.mean[0],
        got.var[3],
        np.reshape(got.dx, (24, 3)),
        total(got.dscale),
        total(got.dbias),
    )
    assert_steps_close(got, ioffe_step(problem, 1.2, 0.2, rows=rows), F32)


def test_compiled_it_reduces_and_communicates_no_more_than_batch_norm():
    params, stats, x, _ = make_problem((8, 4, 3))

    def compiled(normalise, **options):
        def loss(params, x):
            y, new = normalise(params, stats, x, train=True, axis_name="a", **options)
            return jnp.sum(y**3), new

        grad = jax.value_and_grad(loss, (0, 1), has_aux=True)
        mapped = jax.pmap(grad, axis_name="a", in_axes=(None, 0))
        text = mapped.lower(params, x).compile().as_text()
        return {
            name: len(re.findall(rf" {name}(?:-start)?\(", text))
            for name in ("reduce", "all-reduce")
        }

    expected = compiled(batch_norm)
    assert expected["reduce"] > 0
    assert expected["all-reduce"] == 2
    assert compiled(batch_renorm, r_max=3.0, d_max=5.0) == expected


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_written_for_every_platform_it_reduces_no_more(platform, dtype):
    params, stats, x, _ = make_problem((8, 4, 3), dtype=dtype)

    def reductions(normalise, **options):
        def loss(params, x):
            y, new = normalise(params, stats, x, train=True, **options)
            return jnp.sum(y.astype(jnp.float32) ** 3), new

        step = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
        lowered = step.trace(params, x).lower(lowering_platforms=(platform,))
        return lowered.as_text().count("stablehlo.reduce(")

    expected = reductions(batch_norm)
    assert expected > 0
    assert reductions(batch_renorm, r_max=3.0, d_max=5.0) == expected


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"r_max": 0.9}, ValueError, "r_max must be at least 1, got 0.9"),
        ({"r_max": np.nan}, ValueError, "r_max must be at least 1, got nan"),
        ({"d_max": -1}, ValueError, "d_max must be at least 0, got -1"),
        ({"r_max": "3"}, TypeError, "r_max must be a number, got str"),
        ({"d_max": None}, TypeError, "d_max must be a number, got NoneType"),
        (
            {"r_max": np.ones(3)},
            ValueError,
            r"r_max must be a scalar, got shape \(3,\)",
        ),
        ({"eps": 0}, ValueError, "eps must be positive"),
        ({"decay": 2}, ValueError, "decay must be within"),
        ({"axis": 5}, ValueError, "out of range"),
        ({"stats": None}, ValueError, "stats are missing"),
        ({"params": None}, TypeError, "must be BatchNormParams"),
    ],
)
def test_bad_arguments(options, error, message):
    params, stats, x, _ = make_problem((8, 3))
    arguments = {"params": params, "stats": stats, "r_max": 3, "d_max": 5} | options
    with pytest.raises(error, match=message):
        batch_renorm(x=x, train=True, **arguments)
