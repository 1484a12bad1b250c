"""Section 2's failure, by hand: the bias grows, the loss stands still."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bn_jax
from experiments.why.probes.outside_gradient import normalise_outside_gradient
from tests.bn_jax.reference import enable_x64

RATE = 0.1


def train_bias(normalise, inputs, target, num_steps):
    """Biases and losses of x = u + b, xhat = normalise(x), (xhat - target)^2 / 2."""
    params, stats = bn_jax.init_params(1, inputs.dtype), bn_jax.init_stats(1)

    def loss_of(bias):
        xhat, _ = normalise(params, stats, inputs[:, None] + bias)
        return jnp.mean((xhat - target) ** 2) / 2

    bias, biases, losses = jnp.zeros(1, inputs.dtype), [], []
    for _ in range(num_steps):
        loss, gradient = jax.value_and_grad(loss_of)(bias)
        biases.append(float(bias[0]))
        losses.append(float(loss))
        bias = bias - RATE * gradient
    return np.array(biases), np.array(losses)


@pytest.mark.parametrize("target", [2.0, -0.5])
def test_the_papers_example(target):
    """By hand: dl/db = mean(xhat - target) = -target, whatever b is."""

    def centre(params, stats, x):
        return normalise_outside_gradient(params, stats, x, centre_only=True)

    inputs = np.array([1.0, 2.0, 6.0])
    with enable_x64():
        biases, losses = train_bias(centre, jnp.asarray(inputs), target, 6)
    np.testing.assert_allclose(biases, RATE * target * np.arange(6), rtol=1e-6)
    variance = ((inputs - 3) ** 2).mean()
    np.testing.assert_allclose(losses, (variance + target**2) / 2, rtol=1e-5)


def test_with_the_variance_too():
    """By hand: dl/db = mean(xhat - target) / std = -target / std."""
    inputs, target = np.array([1.0, 2.0, 6.0]), 2.0
    with enable_x64():
        biases, losses = train_bias(
            normalise_outside_gradient, jnp.asarray(inputs), target, 6
        )
    std = np.sqrt(inputs.var() + 1e-5)
    np.testing.assert_allclose(biases, RATE * target / std * np.arange(6), rtol=1e-6)
    np.testing.assert_allclose(losses, losses[0], rtol=1e-6)


def test_within_the_gradient_nothing_grows():
    def within(params, stats, x):
        return bn_jax.batch_norm(params, stats, x, train=True)

    biases, losses = train_bias(within, jnp.array([1.0, 2.0, 6.0]), 2.0, 6)
    np.testing.assert_allclose(biases, 0, atol=1e-6)
    np.testing.assert_allclose(losses, losses[0], rtol=1e-6)


def test_forward_it_is_batch_normalisation():
    x = jax.random.normal(jax.random.key(0), (40, 5, 3)) * 4 + 1
    params, stats = bn_jax.init_params(3), bn_jax.init_stats(3)
    y, moved = normalise_outside_gradient(params, stats, x, decay=0.9)
    expected, expected_stats = bn_jax.batch_norm(
        params, stats, x, train=True, decay=0.9
    )
    np.testing.assert_allclose(y, expected, atol=1e-5)
    np.testing.assert_allclose(moved.mean, expected_stats.mean, rtol=1e-6)
    np.testing.assert_allclose(moved.var, expected_stats.var, rtol=1e-6)
