"""The state of a training run."""

from typing import Any, NamedTuple

import jax
import optax


class TrainState(NamedTuple):
    """What a training step reads and writes, and a checkpoint holds."""

    step: jax.Array  # (), int32: steps done
    params: Any  # Flax collection
    batch_stats: Any  # Flax collection; empty without batch normalisation
    opt_state: optax.OptState

    @property
    def variables(self) -> dict[str, Any]:
        """What the model's `apply` takes."""
        return {"params": self.params, "batch_stats": self.batch_stats}
