"""Batch normalisation in NumPy float64, as the paper prints it, and how to compare.

Weights are applied literally: a row of weight 0 is deleted, one of weight 2 repeated.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import experimental

from bn_jax import BatchNormParams, BatchStats, batch_norm

Array = npt.NDArray[np.float64]

# JAX before 0.9 has it elsewhere.
enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else experimental.enable_x64


class Step(NamedTuple):
    """What one training step yields, for a cotangent dy of the output."""

    y: npt.ArrayLike
    mean: npt.ArrayLike  # of the statistics after the step, as var
    var: npt.ArrayLike
    dx: npt.ArrayLike
    dscale: npt.ArrayLike
    dbias: npt.ArrayLike


class Problem(NamedTuple):
    """Arguments of one step; the statistics start at values that are easy to miss."""

    params: BatchNormParams
    stats: BatchStats
    x: npt.ArrayLike
    dy: npt.ArrayLike


def make_problem(
    shape: Sequence[int],
    axis: int | Sequence[int] = -1,
    *,
    seed: int = 0,
    mean: float = 0.5,
    dtype: npt.DTypeLike = np.float32,
) -> Problem:
    """A random problem; x and dy are rounded to dtype, the rest is float32."""
    rng = np.random.default_rng(seed)
    axes = [axis] if isinstance(axis, int) else axis
    features = tuple(shape[i] for i in sorted(a % len(shape) for a in axes))
    full = np.float64 if np.dtype(dtype) == np.float64 else np.float32

    def uniform(low: float, high: float) -> npt.NDArray[Any]:
        return rng.uniform(low, high, features).astype(full)

    scale = uniform(0.5, 1.5) * rng.choice([-1, 1], features).astype(full)
    return Problem(
        params=BatchNormParams(scale, uniform(-0.5, 0.5)),
        stats=BatchStats(uniform(-1, 1), uniform(0.5, 2)),
        x=(mean + rng.normal(size=shape) * 1.5).astype(dtype),
        dy=rng.normal(size=shape).astype(dtype),
    )


def paper_rows(
    x: Array, dy: Array, gamma: Array, beta: Array, eps: float, relu: bool = False
) -> tuple[Array, ...]:
    """Algorithm 1 and section 3's gradients for rows of features: (m, features)."""
    m = len(x)
    mu = x.sum(0) / m
    var = ((x - mu) ** 2).sum(0) / m
    xhat = (x - mu) / np.sqrt(var + eps)
    y = gamma * xhat + beta
    if relu:
        dy = dy * (y > 0)
        y = np.maximum(y, 0)
    dxhat = dy * gamma
    dvar = (dxhat * (x - mu)).sum(0) * (-1 / 2) * (var + eps) ** (-3 / 2)
    dmu = -dxhat.sum(0) / np.sqrt(var + eps) + dvar * (-2 * (x - mu)).sum(0) / m
    dx = dxhat / np.sqrt(var + eps) + dvar * 2 * (x - mu) / m + dmu / m
    return y, mu, var, dx, (dy * xhat).sum(0), dy.sum(0)


def expected_step(
    problem: Problem,
    *,
    axis: int | Sequence[int] = -1,
    eps: float = 1e-5,
    decay: float = 0.99,
    weights: npt.ArrayLike | None = None,
    activation: str | None = None,
    unbiased: bool = True,
) -> Step:
    """What `actual_step` must give. Weights are whole numbers."""
    (scale, bias), old, x, dy = jax.tree.map(np.float64, problem)
    axes = sorted(a % x.ndim for a in ([axis] if isinstance(axis, int) else axis))
    last = range(x.ndim - len(axes), x.ndim)

    def rows(array: Array) -> Array:
        return np.moveaxis(array, axes, last).reshape(-1, scale.size)

    def unrows(array: Array) -> Array:
        moved = np.moveaxis(x, axes, last).shape
        return np.moveaxis(array.reshape(moved), last, axes)

    counts = np.ones(x.shape) if weights is None else np.float64(weights)
    counts = rows(np.broadcast_to(counts, x.shape)).astype(int)
    y, dx = np.zeros((2, *counts.shape))
    mean, var, dscale, dbias = np.zeros((4, scale.size))
    mean[:], var[:] = old.mean.ravel(), old.var.ravel()
    for j, column_counts in enumerate(counts.T):
        copies = np.repeat(np.arange(len(counts)), column_counts)
        m = len(copies)
        if m == 0:
            continue
        # A value that counts twice is there twice, and its output is used once.
        first = np.r_[True, copies[1:] != copies[:-1]]
        column, mu, biased, column_dx, dscale[j], dbias[j] = paper_rows(
            rows(x)[copies, j],
            rows(dy)[copies, j] * first,
            scale.ravel()[j],
            bias.ravel()[j],
            eps,
            activation == "relu",
        )
        y[copies, j] = column
        np.add.at(dx[:, j], copies, column_dx)
        mean[j] = decay * mean[j] + (1 - decay) * mu
        correction = m / max(m - 1, 1) if unbiased else 1
        var[j] = decay * var[j] + (1 - decay) * biased * correction
    per_feature = (a.reshape(scale.shape) for a in (mean, var, dscale, dbias))
    mean, var, dscale, dbias = per_feature
    return Step(unrows(y), mean, var, unrows(dx), dscale, dbias)


def as_step(
    y: jax.Array, stats: BatchStats, grads: tuple[BatchNormParams, jax.Array]
) -> Step:
    """Puts outputs, statistics and gradients of (params, x) side by side."""
    params_grad, x_grad = grads
    return Step(y, stats.mean, stats.var, x_grad, params_grad.scale, params_grad.bias)


@functools.partial(jax.jit, static_argnames=("axis", "activation", "unbiased", "eps"))
def actual_step(
    problem: Problem, *, weights: jax.Array | None = None, **options: Any
) -> Step:
    """One training step of bn_jax with its gradients."""

    def forward(params: BatchNormParams, x: jax.Array) -> tuple[jax.Array, BatchStats]:
        return batch_norm(
            params, problem.stats, x, train=True, weights=weights, **options
        )

    x = jnp.asarray(problem.x)
    y, pullback, stats = jax.vjp(forward, problem.params, x, has_aux=True)
    return as_step(y, stats, pullback(jnp.asarray(problem.dy, y.dtype)))


def assert_steps_close(
    actual: Step, expected: Step, tolerance: float, value_tolerance: float | None = None
) -> None:
    """Compares each field, with errors measured against its largest value.

    Args:
      actual: as computed by bn_jax.
      expected: as it should be.
      tolerance: of sums and statistics.
      value_tolerance: of y and dx, where they are in a coarser dtype.
    """
    for name, got, want in zip(Step._fields, actual, expected, strict=True):
        coarse = value_tolerance is not None and name in ("y", "dx")
        assert_close(got, want, value_tolerance if coarse else tolerance, name)


def assert_close(
    actual: npt.ArrayLike,
    expected: npt.ArrayLike,
    tolerance: float,
    name: str = "value",
) -> None:
    """Largest error at most tolerance, relative to the largest value (at least 1)."""
    actual, expected = np.float64(actual), np.float64(expected)
    assert actual.shape == expected.shape, name
    size = max(1.0, np.abs(expected).max(initial=0))
    error = np.abs(actual - expected).max(initial=0) / size
    assert error <= tolerance, f"{name}: error {error:.3g} > {tolerance:.3g}"


def plain_batch_norm(
    params: BatchNormParams,
    x: jax.Array,
    *,
    eps: float = 1e-5,
    weights: jax.Array | float = 1.0,
    relu: bool = False,
) -> jax.Array:
    """Algorithm 1 in plain jnp, last axis features: what autodiff differentiates."""
    axes = tuple(range(x.ndim - 1))
    weights = jnp.broadcast_to(jnp.asarray(weights, x.dtype), x.shape)
    total = weights.sum(axes, keepdims=True)
    mean = (weights * x).sum(axes, keepdims=True) / total
    var = (weights * (x - mean) ** 2).sum(axes, keepdims=True) / total
    normalised = (x - mean) / jnp.sqrt(var + eps)
    y = normalised * jnp.expand_dims(params.scale, axes)
    y = y + jnp.expand_dims(params.bias, axes)
    return jnp.maximum(y, 0) if relu else y


@contextmanager
def lenient() -> Iterator[None]:
    """JAX's defaults, for peers that rely on implicit promotion."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
