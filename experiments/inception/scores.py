"""Right answers and the loss, summed over examples."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Scores(NamedTuple):
    """Sums over examples; an array or a number each."""

    top1: Any  # right answers
    top5: Any  # right answers among the five most probable
    loss: Any  # cross-entropy
    count: Any  # examples

    def percentages(self) -> dict[str, float | None]:
        """Accuracies in percent, and the mean loss."""
        return {
            "top1": 100 * self.top1 / self.count,
            "top5": 100 * self.top5 / self.count,
            "loss": self.loss / self.count,
        }


def score(probabilities: Any, labels: Any, mask: Any) -> Scores:
    """Sums over the examples that count.

    A right answer among the first five is one that fewer than five classes beat; the
    first of equals wins, so that a network at chance is not always right.

    Args:
      probabilities: (examples, classes), float32.
      labels: (examples,), int32.
      mask: (examples,), bool.
    """
    classes = jnp.arange(probabilities.shape[-1])
    own = jnp.take_along_axis(probabilities, labels[:, None], axis=-1)
    beaten = (probabilities > own) | (
        (probabilities == own) & (classes < labels[:, None])
    )
    rank = jnp.sum(beaten, axis=-1)
    # In a network that is not finite no class beats another; it is never right.
    counts = mask & jnp.isfinite(own[:, 0])

    def count(right: jax.Array) -> jax.Array:
        return jnp.sum(right & counts, dtype=jnp.int32)

    tiny = jnp.finfo(jnp.float32).tiny
    losses = -jnp.log(jnp.maximum(own[:, 0], tiny))
    return Scores(
        count(rank < 1),
        count(rank < 5),
        jnp.sum(jnp.where(mask, losses, 0)),
        jnp.sum(mask, dtype=jnp.int32),
    )
