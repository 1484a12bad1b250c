"""Internal covariate shift as a change of gradients."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Shift(NamedTuple):
    """How the layers before it change each layer's gradient; (layers,) each."""

    l2: jax.Array
    relative: jax.Array  # l2 over the gradient's norm before; NaN where that is 0
    cosine: jax.Array  # of the angle between both; NaN where one is 0


def covariate_shift(
    loss: Callable[[Sequence[Any]], jax.Array],
    layers: Sequence[Any],
    moved: Sequence[Any],
) -> Shift:
    """Compares each layer's gradient before and after those before it have moved.

    Santurkar et al. 2018, definition 2.1. For layer i of k,

      G  = d L(W_1, ..., W_k) / d W_i
      G' = d L(W'_1, ..., W'_{i-1}, W_i, ..., W_k) / d W_i

    where W' are the parameters after an update, and the shift is |G - G'|. They report
    the angle between both, too. The first layer has none before it: its shift is 0.

    Args:
      loss: from the layers to the loss, (), on one batch.
      layers: each layer's parameters, a pytree of floating arrays, from the input on.
      moved: the same after an update.

    Returns:
      One value a layer.
    """
    layers, moved = list(layers), list(moved)
    gradients = jax.grad(loss)(layers)

    def look(number: jax.Array) -> Shift:
        mixed = [
            jax.tree.map(
                lambda old, new, at=at: jnp.where(at < number, new, old), *pair
            )
            for at, pair in enumerate(zip(layers, moved, strict=True))
        ]
        pairs = zip(gradients, jax.grad(loss)(mixed), strict=True)
        all_layers = [_compare(before, after) for before, after in pairs]
        # Of all layers; the one that is asked for is taken, so that one program serves.
        return jax.tree.map(lambda *values: jnp.stack(values)[number], *all_layers)

    return jax.lax.map(look, jnp.arange(len(layers)))


def _compare(before: Any, after: Any) -> Shift:
    one, other = (
        jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(layer)])
        for layer in (before, after)
    )
    norm = jnp.linalg.norm(one)
    l2 = jnp.linalg.norm(one - other)
    cosine = jnp.vdot(one, other) / (norm * jnp.linalg.norm(other))
    return Shift(l2, l2 / norm, cosine)
