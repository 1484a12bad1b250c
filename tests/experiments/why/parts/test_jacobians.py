"""What the part takes for the transformation between layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.why.networks import WITHOUT, mlp
from experiments.why.parts.jacobians import transformations
from experiments.why.probes.layer_jacobians import singular_values

KEY = jax.random.key(0)
IMAGES = jax.random.normal(jax.random.key(1), (30, 4))
EPS = 1e-3


def layers_of(normalisation):
    model = mlp(4, (5, 6, 3), 2, normalisation=normalisation)
    params, _ = model.init(KEY, jnp.float32(1.0))
    leaves, structure = jax.tree.flatten(params)
    shaken = [leaf + 0.2 * jax.random.normal(KEY, leaf.shape) for leaf in leaves]
    return structure.unflatten(shaken)[:-1]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize(
    ("normalisation", "normalised"),
    [(WITHOUT, False), (WITHOUT, True), ("batch_norm", True)],
)
def test_vectors_and_jacobians(normalisation, normalised):
    """By NumPy: diag(1 / std') W diag(g'(scale x + bias) scale), x normalised."""
    layers = layers_of(normalisation)
    u = np.asarray(IMAGES, np.float64)
    u = u @ layers[0].kernel + (0 if layers[0].bias is None else layers[0].bias)
    found = list(transformations(layers, IMAGES, normalised, EPS))
    assert len(found) == 2
    for number, (transform, x) in enumerate(found):
        layer, following = layers[number], layers[number + 1]
        mean, std = u.mean(0), np.sqrt(u.var(0) + EPS)
        if not normalised:
            mean, std = np.zeros_like(mean), np.ones_like(std)
        np.testing.assert_allclose(x, (u - mean) / std, atol=1e-4)
        scale, bias = (std, mean) if layer.norm is None else layer.norm
        g = sigmoid(np.asarray(x) * scale + bias)
        u = g @ following.kernel + (0 if following.bias is None else following.bias)
        next_std = np.sqrt(u.var(0) + EPS) if normalised else np.ones(u.shape[1])
        slopes = (g * (1 - g) * scale)[:, None, :]
        jacobians = np.asarray(following.kernel).T / next_std[:, None] * slopes
        expected = np.linalg.svd(jacobians, compute_uv=False)
        np.testing.assert_allclose(
            singular_values(transform, x), expected, rtol=1e-3, atol=1e-4
        )
