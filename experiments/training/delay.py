"""Gradients that arrive late, as those of asynchronous training do."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class DelayState(NamedTuple):
    """Gradients under way."""

    oldest: jax.Array  # (), int32: the place of the one that arrives next
    waiting: Any  # a ring: as the gradients, with a leading axis (steps)


def delayed(steps: int) -> optax.GradientTransformation:
    """Hands on the gradient of so many steps before: that of older parameters.

    The paper trained on many machines at once, each of which read the parameters,
    computed a gradient, and sent it when others had changed them already. Here the
    parameters stay as they are until the first gradient arrives.

    Args:
      steps: how late, at least 1.
    """

    def init(params: Any) -> DelayState:
        ring = jax.tree.map(lambda x: jnp.zeros((steps, *x.shape), x.dtype), params)
        return DelayState(jnp.zeros((), jnp.int32), ring)

    def update(
        gradients: Any, state: DelayState, params: Any = None
    ) -> tuple[Any, DelayState]:
        del params
        arriving = jax.tree.map(lambda ring: ring[state.oldest], state.waiting)
        waiting = jax.tree.map(
            lambda ring, new: ring.at[state.oldest].set(new), state.waiting, gradients
        )
        return arriving, DelayState((state.oldest + 1) % steps, waiting)

    return optax.GradientTransformation(init, update)
