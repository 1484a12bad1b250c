"""Ghost batches: each virtual batch is a batch of its own."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax import batch_norm, ghost_batch_norm, init_params, init_stats
from tests.bn_jax.reference import (
    Problem,
    Step,
    as_step,
    assert_close,
    assert_steps_close,
    expected_step,
    make_problem,
    plain_batch_norm,
)
from tests.bn_jax.sharing import map_devices

F32 = 32 * np.finfo(np.float32).eps


def ghost_step(problem: Problem, weights: Any = None, **options: Any) -> Step:
    """One training step with its gradients."""

    @jax.jit
    def step(problem: Problem, weights: Any) -> Step:
        def forward(params, x):
            return ghost_batch_norm(
                params, problem.stats, x, train=True, weights=weights, **options
            )

        x = jnp.asarray(problem.x)
        y, pullback, stats = jax.vjp(forward, problem.params, x, has_aux=True)
        return as_step(y, stats, pullback(jnp.asarray(problem.dy, y.dtype)))

    return step(problem, weights)


def expected_ghost_step(
    problem: Problem,
    size: int,
    batch_axis: int = 0,
    weights: np.ndarray | None = None,
    decay: float = 0.99,
    unbiased: bool = True,
    axis: Any = -1,
    **options: Any,
) -> Step:
    """The paper's step for each virtual batch, and averages over their moments."""
    number = np.shape(problem.x)[batch_axis] // size
    full = None if weights is None else np.broadcast_to(weights, np.shape(problem.x))
    steps, moments = [], []
    for i in range(number):

        def part(array, i=i):
            return np.split(np.float64(array), number, batch_axis)[i]

        x = part(problem.x)
        own = Problem(problem.params, problem.stats, x, part(problem.dy))
        own_weights = None if full is None else part(full)
        steps.append(expected_step(own, axis=axis, weights=own_weights, **options))
        axes = [a % x.ndim for a in ([axis] if isinstance(axis, int) else axis)]
        columns = np.moveaxis(x, sorted(axes), range(len(axes)))
        features = columns.shape[: len(axes)]
        columns = columns.reshape(int(np.prod(features)), -1)
        counts = np.ones(columns.shape, int)
        if full is not None:
            counts = np.moveaxis(own_weights, sorted(axes), range(len(axes)))
            counts = counts.reshape(columns.shape).astype(int)
        rows = [np.repeat(c, n) for c, n in zip(columns, counts, strict=True)]
        moments.append(
            [
                (len(r), r.mean(), r.var() * len(r)) if len(r) else (0, 0, 0)
                for r in rows
            ]
        )
    m, mean, squares = np.moveaxis(np.float64(moments), -1, 0)  # (virtual, features)
    freedom = np.maximum(m - 1, 0) if unbiased else m
    old = [np.float64(field).ravel() for field in problem.stats]
    new_mean = (m * mean).sum(0) / np.maximum(m.sum(0), 1)
    new_var = squares.sum(0) / np.maximum(freedom.sum(0), 1)
    new = [
        np.where(m.sum(0) > 0, decay * before + (1 - decay) * now, before)
        for before, now in zip(old, (new_mean, new_var), strict=True)
    ]
    return Step(
        np.concatenate([s.y for s in steps], batch_axis),
        *(field.reshape(np.shape(problem.stats.mean)) for field in new),
        np.concatenate([s.dx for s in steps], batch_axis),
        sum(s.dscale for s in steps),
        sum(s.dbias for s in steps),
    )


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize(
    ("shape", "axis", "batch_axis", "size"),
    [
        ((12, 3), -1, 0, 4),
        ((12, 3), -1, 0, 12),
        ((6, 2, 2, 3), -1, 0, 3),
        ((6, 3, 2, 2), 1, 0, 1),
        ((3, 8, 2), 0, 1, 2),
        ((5, 2, 3, 4), (1, 2), -1, 2),
    ],
)
def test_against_the_paper_for_each_part(shape, axis, batch_axis, size, activation):
    problem = make_problem(shape, axis, seed=len(shape))
    options = {"axis": axis, "batch_axis": batch_axis, "activation": activation}
    got = ghost_step(problem, virtual_batch_size=size, decay=0.7, **options)
    expected = expected_ghost_step(problem, size, decay=0.7, **options)
    assert_steps_close(got, expected, F32)


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize(
    "weights",
    [
        np.float32([1, 1, 0, 2, 0, 0, 0, 0, 3, 0, 0, 0])[:, None],
        np.float32([[2, 1, 0]]),
        np.zeros((12, 1), np.float32),
        np.random.default_rng(0).integers(0, 3, (12, 3)).astype(np.float32),
    ],
)
def test_weights(weights, unbiased):
    problem = make_problem((12, 3), seed=1)
    x = np.where(np.broadcast_to(weights, (12, 3)) == 0, np.nan, problem.x)
    # Where one value counts, 1 / sqrt(eps) times the rounding of 0 is the gradient.
    options = {"weights": weights, "decay": 0.5, "unbiased": unbiased, "eps": 1e-3}
    expected = expected_ghost_step(problem, 4, **options)
    got = ghost_step(problem._replace(x=x), virtual_batch_size=4, **options)
    assert_steps_close(got, expected, F32)


def test_numbers_worked_by_hand():
    # Virtual batches (1, 3) and (10, 14): means 2 and 12, unbiased variances 2 and 8.
    x = jnp.array([[1.0], [3.0], [10.0], [14.0]])
    y, stats = ghost_batch_norm(
        init_params(1),
        init_stats(1),
        x,
        train=True,
        virtual_batch_size=2,
        decay=0.0,
        eps=1e-12,
    )
    assert_close(y, [[-1], [1], [-1], [1]], 1e-6)
    assert_close(stats.mean, [7], 1e-6)
    assert_close(stats.var, [5], 1e-6)


def test_one_virtual_batch_is_batch_norm():
    params, stats, x, _ = make_problem((8, 3))
    got = ghost_batch_norm(params, stats, x, train=True, virtual_batch_size=8)
    expected = batch_norm(params, stats, x, train=True)
    jax.tree.map(lambda a, b: assert_close(a, b, F32), got, expected)


def test_same_as_devices_that_share_nothing():
    params, stats, x, _ = make_problem((8, 3))
    alone = functools.partial(batch_norm, train=True)
    y, each = jax.vmap(alone, in_axes=(None, None, 0))(
        params, stats, x.reshape(4, 2, 3)
    )
    got, new = ghost_batch_norm(params, stats, x, train=True, virtual_batch_size=2)
    assert_close(got, y.reshape(8, 3), F32)
    jax.tree.map(lambda a, b: assert_close(a, b.mean(0), F32), new, each)


def test_gradient_of_real_weights():
    params, stats, x, dy = make_problem((8, 3), seed=4)
    weights = np.random.default_rng(1).uniform(0.5, 2, (8, 1)).astype(np.float32)

    def loss(weights):
        y, _ = ghost_batch_norm(
            params, stats, x, train=True, virtual_batch_size=4, weights=weights
        )
        return jnp.vdot(dy, y)

    def plain_loss(weights):
        parts = [np.s_[:4], np.s_[4:]]
        y = [plain_batch_norm(params, x[p], weights=weights[p]) for p in parts]
        return jnp.vdot(dy, jnp.concatenate(y))

    assert_close(jax.grad(loss)(weights), jax.grad(plain_loss)(weights), F32)


def test_inference_is_batch_norm():
    params, stats, x, _ = make_problem((8, 3))
    options = {"train": False, "eps": 0.1, "activation": "relu"}
    got = ghost_batch_norm(params, stats, x, virtual_batch_size=4, **options)
    expected = batch_norm(params, stats, x, **options)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize("mode", ["pmap", "vmap", "unchecked", "checked", "cast"])
def test_on_devices(mode):
    problem = make_problem((16, 3), seed=5)

    def step(params, stats, x, dy):
        def forward(params, x):
            return ghost_batch_norm(params, stats, x, train=True, virtual_batch_size=2)

        y, pullback, new = jax.vjp(forward, params, x, has_aux=True)
        return as_step(y, new, pullback(dy))

    split = (jnp.asarray(a).reshape(4, 4, 3) for a in (problem.x, problem.dy))
    got = map_devices(mode, step, 4, replicated=2)(*problem[:2], *split)
    expected = expected_ghost_step(problem, 2)
    assert_close(np.reshape(got.y, (16, 3)), expected.y, F32)
    assert_close(np.reshape(got.dx, (16, 3)), expected.dx, F32)
    # In the checked mode, replicated parameters hold the sum over devices already.
    total = (lambda a: a[0]) if mode == "checked" else (lambda a: a.sum(0))
    assert_close(total(got.dscale), expected.dscale, F32)
    assert_close(total(got.dbias), expected.dbias, F32)
    assert_close(got.mean.mean(0), expected.mean, F32)
    assert_close(got.var.mean(0), expected.var, F32)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"virtual_batch_size": 3}, ValueError, "=3 does not divide a batch of 8"),
        ({"virtual_batch_size": 16}, ValueError, "=16 does not divide a batch of 8"),
        ({"virtual_batch_size": 0}, ValueError, "=0 does not divide"),
        ({"virtual_batch_size": -2}, ValueError, "=-2 does not divide"),
        ({"virtual_batch_size": 2.0}, TypeError, "must be an integer .* got float"),
        ({"virtual_batch_size": 1}, ValueError, "more than one value per feature"),
        (
            {"virtual_batch_size": 2, "batch_axis": 1},
            ValueError,
            "batch_axis=1 is one of the feature axes",
        ),
        (
            {"virtual_batch_size": 2, "batch_axis": 2},
            ValueError,
            "axis 2 is out of range",
        ),
    ],
)
def test_bad_arguments(options, error, message):
    params, stats, x, _ = make_problem((8, 3))
    with pytest.raises(error, match=message):
        ghost_batch_norm(params, stats, x, train=True, **options)
