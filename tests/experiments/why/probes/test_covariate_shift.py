"""Covariate shift of linear networks, by NumPy, and where it has to be 0."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.why.probes.covariate_shift import covariate_shift


def linear_network(seed):
    """Layers (3 to 4 to 2 to 1), their changes, inputs and targets."""
    random = np.random.default_rng(seed)
    sizes = (3, 4, 2, 1)
    layers = [random.normal(size=shape) for shape in itertools.pairwise(sizes)]
    moved = [layer + 0.3 * random.normal(size=layer.shape) for layer in layers]
    return layers, moved, random.normal(size=(5, 3)), random.normal(size=(5, 1))


def loss_of(inputs, targets):
    def loss(layers):
        x = inputs
        for layer in layers:
            x = x @ layer["kernel"]
        return jnp.sum((x - targets) ** 2) / 2

    return loss


def as_trees(layers):
    return [{"kernel": jnp.asarray(layer)} for layer in layers]


def gradient(layers, inputs, targets, number):
    """Of a linear network's squared error, in float64."""

    def product(some, start):
        for layer in some:
            start = start @ layer
        return start

    before = product(layers[:number], inputs)
    after = product(layers[number + 1 :], np.eye(layers[number].shape[1]))
    error = product(layers, inputs) - targets
    return before.T @ error @ after.T


@pytest.mark.parametrize("seed", range(5))
def test_linear_networks(seed):
    layers, moved, inputs, targets = linear_network(seed)
    shift = jax.jit(lambda *both: covariate_shift(loss_of(inputs, targets), *both))(
        as_trees(layers), as_trees(moved)
    )
    for number in range(3):
        one = gradient(layers, inputs, targets, number)
        mixed = [*moved[:number], *layers[number:]]
        other = gradient(mixed, inputs, targets, number)
        l2, norm = np.linalg.norm(one - other), np.linalg.norm(one)
        cosine = np.sum(one * other) / norm / np.linalg.norm(other)
        found = [float(values[number]) for values in shift]
        # The first layer's shift is rounding, which has no relative accuracy.
        np.testing.assert_allclose(found, [l2, l2 / norm, cosine], 1e-3, 1e-5)


def test_no_shift_where_the_layers_before_are_frozen():
    layers, moved, inputs, targets = linear_network(9)
    for frozen in range(4):
        partly = as_trees([*layers[:frozen], *moved[frozen:]])
        shift = covariate_shift(loss_of(inputs, targets), as_trees(layers), partly)
        # Layer `frozen` itself moves, which is not what its own shift is about.
        np.testing.assert_array_equal(shift.l2[: frozen + 1], 0)
        np.testing.assert_allclose(shift.cosine[: frozen + 1], 1, rtol=1e-6)
        assert (shift.l2[frozen + 1 :] > 1e-3).all()
