"""Makes the checkpoint in the folder stored that later versions must read.

    python -m tests.experiments.checkpoints.make_stored

A tiny network after some steps, saved by `Checkpoints` on one CPU
device, and the same arrays as NumPy saves them. To be run again only when the format
gets a new number; folders of earlier numbers stay.
"""

import shutil
from pathlib import Path

import jax
import numpy as np
import optax

from experiments.checkpoints.save import Checkpoints
from experiments.checkpoints.stored import FORMATS, named_leaves
from experiments.mnist.network import MLP
from experiments.training.optimisers import make_optimiser
from experiments.training.state import TrainState
from experiments.training.steps import Batch, init_state

STORED = Path(__file__).parent / "stored"
NETWORK, STEP, SCORE = "network", 3, 62.5
CONFIG = {"learning_rate": 0.1, "note": "committed for later versions"}
MODEL = MLP(hidden=(2,), num_classes=3)
OPTIMISER = make_optimiser(momentum=0.9)


def initial_state() -> TrainState:
    return init_state(MODEL, (4,), jax.random.key(0), 0.1, OPTIMISER)


def trained_state() -> TrainState:
    """Some steps on random data: no array is what it is at first."""
    state = initial_state()
    keys = jax.random.split(jax.random.key(1), STEP)
    for key in keys:
        inputs = jax.random.normal(key, (8, 4))
        batch = Batch(inputs, np.arange(8, dtype=np.int32) % 3)

        def loss_of(params, state=state, batch=batch):
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, updated = MODEL.apply(
                variables, batch.inputs, train=True, mutable=["batch_stats"]
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(
                logits, batch.labels
            )
            return losses.mean(), updated["batch_stats"]

        grads, batch_stats = jax.grad(loss_of, has_aux=True)(state.params)
        updates, opt_state = OPTIMISER.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        state = TrainState(state.step + 1, params, batch_stats, opt_state)
    return state


def main() -> None:
    folder = STORED / f"format_{FORMATS[-1]}"
    shutil.rmtree(folder, ignore_errors=True)
    state = trained_state()
    checkpoints = Checkpoints(folder / "checkpoints", CONFIG)
    checkpoints.save(STEP, {NETWORK: state}, SCORE)
    checkpoints.close()
    for path in folder.rglob("commit_success.txt"):
        path.unlink()  # nothing reads it, and it names folders of this machine
    np.savez(
        folder / "arrays.npz",
        allow_pickle=False,
        **named_leaves(jax.device_get(state._asdict())),
    )


if __name__ == "__main__":
    main()
