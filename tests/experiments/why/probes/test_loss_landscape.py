"""Along the gradient of losses whose smoothness is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.why.probes.loss_landscape import along_gradient

SIZES = np.array([0.05, 0.1, 0.4])


@pytest.mark.parametrize("seed", range(5))
def test_a_quadratic(seed):
    random = np.random.default_rng(seed)
    root, w, c = (random.normal(size=shape) for shape in ((4, 4), 4, 4))
    hessian = root @ root.T
    gradient = hessian @ w + c
    points = [w - size * gradient for size in SIZES]

    def loss(params):
        # As several arrays, whose norms count as one.
        w = jnp.concatenate([params["one"], params["other"].ravel()])
        return w @ hessian @ w / 2 + c @ w

    params = {"one": jnp.asarray(w[:1]), "other": jnp.asarray(w[1:, None])}
    found = jax.jit(lambda params: along_gradient(loss, params, SIZES))(params)

    steepness = np.linalg.norm(hessian @ gradient)
    norm = np.linalg.norm(gradient)
    expected = [p @ hessian @ p / 2 + c @ p for p in points]
    np.testing.assert_allclose(found.losses, expected, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(found.gradient_changes, SIZES * steepness, rtol=1e-4)
    # Of a quadratic it is the same however far one goes, and at most the largest
    # eigenvalue, the smoothness.
    np.testing.assert_allclose(found.smoothness, [steepness / norm] * 3, rtol=1e-4)
    assert (found.smoothness <= np.linalg.eigvalsh(hessian)[-1] * 1.0001).all()
    np.testing.assert_allclose(found.loss, w @ hessian @ w / 2 + c @ w, rtol=1e-4)
    np.testing.assert_allclose(found.gradient_norm, norm, rtol=1e-5)


def test_along_an_eigenvector_it_is_the_eigenvalue():
    found = along_gradient(lambda w: 3 * jnp.sum(w**2), jnp.array([0.0, 2.0]), SIZES)
    np.testing.assert_allclose(found.smoothness, 6, rtol=1e-5)


def test_a_linear_loss_changes_its_gradient_nowhere():
    found = along_gradient(lambda w: 5 * w.sum(), jnp.ones(3), SIZES)
    np.testing.assert_array_equal(found.gradient_changes, 0)
    np.testing.assert_allclose(found.losses, 15 - 75 * SIZES, rtol=1e-6)
