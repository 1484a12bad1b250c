"""Singular values of layers' Jacobians."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def singular_values(layer: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """The singular values of a layer's Jacobian at each example.

    Section 3.3 of Ioffe & Szegedy 2015 conjectures that batch normalisation brings them
    near to 1: if the normalised inputs x of a layer and those of the next, z = F(x),
    are Gaussian and uncorrelated and F is about linear with Jacobian J, then both
    covariances are I, and I = J J^T.

    Args:
      layer: from one example, (inputs,), to one, (outputs,). A layer with batch
        normalisation is one by fixed statistics, those of a batch or of the
        population.
      x: (examples, inputs), where to look.

    Returns:
      (examples, min(inputs, outputs)), from the largest on.
    """
    jacobians = jax.vmap(jax.jacrev(layer))(x)
    values: jax.Array = jnp.linalg.svd(jacobians, compute_uv=False)
    return values
