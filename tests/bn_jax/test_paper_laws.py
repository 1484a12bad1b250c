"""Section 3.3: normalisation undoes the scale of the weights before it.

And the remarks of section 3: the identity that scale and bias can restore, the bias
that the mean takes away, and the gradient's two sums that vanish.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax import BatchNormParams, batch_norm, init_params, init_stats
from tests.bn_jax.reference import actual_step, assert_close, make_problem

pytestmark = pytest.mark.usefixtures("x64")

TINY = 1e-30  # eps: the laws are exact at 0
EXACT = 1e-12


def layer(kernel: jax.Array, u: jax.Array, train: bool = True) -> jax.Array:
    """A function of BN(Wu) that has gradients in every direction."""
    params = init_params(3, "float64")._replace(scale=jnp.array([0.5, -2.0, 3.0]))
    stats = init_stats(3, "float64")
    y, _ = batch_norm(params, stats, u @ kernel, train=train, eps=TINY)
    return jnp.tanh(y)


def kernel_and_input() -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(4, 3))), jnp.asarray(rng.normal(size=(6, 4)))


@functools.partial(jax.jit, static_argnums=0)
def jacobian(argument: int, kernel: jax.Array, u: jax.Array) -> jax.Array:
    return jax.jacrev(layer, argument)(kernel, u)


SCALES = pytest.mark.parametrize("a", [0.01, 3.0, 1e4])


@SCALES
def test_output_does_not_depend_on_the_scale(a):
    kernel, u = kernel_and_input()
    assert_close(layer(a * kernel, u), layer(kernel, u), EXACT)
    frozen = layer(kernel, u, train=False)
    assert np.abs(layer(a * kernel, u, train=False) - frozen).max() > 0.1


@SCALES
def test_gradient_of_the_input_does_not_depend_on_the_scale(a):
    kernel, u = kernel_and_input()
    expected = jacobian(1, kernel, u)
    assert np.abs(expected).max() > 0.1
    assert_close(jacobian(1, a * kernel, u), expected, EXACT)


@SCALES
def test_larger_weights_have_smaller_gradients(a):
    kernel, u = kernel_and_input()
    expected = jacobian(0, kernel, u)
    assert np.abs(expected).max() > 0.1
    assert_close(a * jacobian(0, a * kernel, u), expected, EXACT)


def test_weights_move_at_right_angles():
    # What follows from the first law: the gradient has no part along the weights.
    kernel, u = kernel_and_input()
    grad = jacobian(0, kernel, u)
    assert_close(jnp.sum(grad * kernel[None, None], (-2, -1)), np.zeros((6, 3)), EXACT)


def test_scale_and_bias_can_restore_the_input():
    x = jnp.asarray(np.random.default_rng(1).normal(3, 2, (8, 3)))
    params = BatchNormParams(jnp.sqrt(x.var(0) + 1e-5), x.mean(0))
    y, _ = batch_norm(params, init_stats(3, "float64"), x, train=True)
    assert_close(y, x, EXACT)


def test_normalised_values_have_mean_zero_and_variance_one():
    x = jnp.asarray(np.random.default_rng(2).normal(30, 7, (64, 3)))
    y, _ = batch_norm(init_params(3), init_stats(3, "float64"), x, train=True, eps=TINY)
    assert_close(y.mean(0), np.zeros(3), EXACT)
    assert_close(y.var(0), np.ones(3), EXACT)


def test_a_bias_before_it_has_no_effect():
    problem = make_problem((8, 3), dtype=np.float64)
    shifted = problem._replace(x=problem.x + np.array([[3.0, -40.0, 0.5]]))
    got, expected = actual_step(shifted), actual_step(problem)
    for name in ("y", "dx", "dscale", "dbias", "var"):
        assert_close(getattr(got, name), getattr(expected, name), EXACT, name)


def test_input_gradient_is_centred_and_uncorrelated():
    problem = make_problem((9, 3), dtype=np.float64)
    step = actual_step(problem, eps=TINY)
    assert_close(step.dx.sum(0), np.zeros(3), EXACT)
    assert_close((step.dx * problem.x).sum(0), np.zeros(3), EXACT)
    assert np.abs(step.dx).max() > 0.1
