"""How well a gradient foretells the loss and the gradient along itself."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike


class Landscape(NamedTuple):
    """What is met along the gradient; the first three are (distances,)."""

    losses: jax.Array
    gradient_changes: jax.Array  # L2
    smoothness: jax.Array  # change of the gradient over distance in parameters
    loss: jax.Array  # (), where the line begins
    gradient_norm: jax.Array  # (), there


def along_gradient(
    loss: Callable[[Any], jax.Array], params: Any, step_sizes: ArrayLike
) -> Landscape:
    """Walks down the gradient, and compares loss and gradient with those of its start.

    Santurkar et al. 2018, section 3 and figure 4. With g = grad L(w) and a step size
    s, the three are

      variation of the loss:    L(w - s g)
      gradient predictiveness:  |g - grad L(w - s g)|
      effective smoothness:     |g - grad L(w - s g)| / |s g|

    and their effective beta-smoothness is the maximum of the last over the steps. Along
    one line it is a lower bound of the smoothness of the loss.

    Args:
      loss: from parameters to the loss, (), on one batch; without other randomness
        than a fixed key's.
      params: a pytree of floating arrays, w.
      step_sizes: (distances,), each more than 0. In the paper, from half to four times
        the learning rate.

    Returns:
      One value a step size. Where the gradient is 0, smoothness is NaN.
    """
    value, gradient = jax.value_and_grad(loss)(params)
    norm = optax.tree.norm(gradient)

    def look(step_size: jax.Array) -> tuple[jax.Array, jax.Array]:
        there = jax.tree.map(lambda w, g: w - step_size * g, params, gradient)
        other_value, other = jax.value_and_grad(loss)(there)
        change = optax.tree.norm(jax.tree.map(jnp.subtract, gradient, other))
        return other_value, change

    sizes = jnp.asarray(step_sizes, norm.dtype)
    losses, changes = jax.lax.map(look, sizes)
    return Landscape(losses, changes, changes / (sizes * norm), value, norm)
