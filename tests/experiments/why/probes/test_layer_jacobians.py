"""Singular values of linear layers are those that they were made of."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.why.probes.layer_jacobians import singular_values


@pytest.mark.parametrize(("inputs", "outputs"), [(4, 4), (3, 5), (6, 2)])
def test_a_linear_layer_of_known_singular_values(inputs, outputs):
    random = np.random.default_rng(inputs)
    left, _ = np.linalg.qr(random.normal(size=(outputs, outputs)))
    right, _ = np.linalg.qr(random.normal(size=(inputs, inputs)))
    known = np.arange(min(inputs, outputs), 0, -1) / 2
    middle = np.zeros((outputs, inputs))
    np.fill_diagonal(middle, known)
    matrix = left @ middle @ right
    found = singular_values(lambda x: matrix @ x + 7, jnp.ones((3, inputs)))
    np.testing.assert_allclose(found, [known] * 3, rtol=1e-5)


def test_they_are_those_of_each_example():
    x = jnp.array([[0.5, 2.0], [3.0, 1.0]])
    found = singular_values(lambda x: x**2, x)
    np.testing.assert_allclose(found, [[4, 1], [6, 2]], rtol=1e-5)
