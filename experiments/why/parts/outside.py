"""Normalisation outside the gradient: section 2's failure."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax
from matplotlib.figure import Figure

from experiments.mnist.experiment import make_replicas
from experiments.running.tables import table
from experiments.training.state import TrainState
from experiments.why.data import Data, first
from experiments.why.figures import LABELS, add_legend, draw_line, grid
from experiments.why.networks import Layer, Model, only_biases
from experiments.why.part import Config, Measured, Part, Row, Setting
from experiments.why.subjects import looks_of, mnist_network
from experiments.why.training import Examples, States, loss_of, train

NORMALISATIONS = ("batch_norm", "mean_outside", "moments_outside")
TRAINED = {"biases": "only biases train", "everything": "everything trains"}


def settings(config: Config) -> list[dict[str, Any]]:
    """What is trained."""
    del config
    return [{"trained": trained} for trained in TRAINED]


def measure(config: Config, data: Data, setting: Setting) -> Measured:
    """Norm of the biases and loss, (looks, seeds) each, for every normalisation."""
    models = {
        name: mnist_network(config, data, normalisation=name, biased=True)
        for name in NORMALISATIONS
    }
    if setting["trained"] == "biases":
        models = {name: only_biases(model) for name, model in models.items()}
    replicas = make_replicas({**config, "learning_rate": config["outside_rate"]})
    probe = first(data.training, config["probe_examples"])
    steps = looks_of(config["outside_steps"], config["num_looks"])
    seen: dict[str, dict[str, list[Any]]] = {
        name: {"bias": [], "loss": []} for name in models
    }

    def look(_: int, states: States) -> None:
        for name, model in models.items():
            for key, values in _look(model, states[name], probe).items():
                seen[name][key].append(np.asarray(values).tolist())

    train(
        models,
        replicas,
        data.training,
        num_steps=config["outside_steps"],
        batch_size=config["batch_size"],
        look=look,
        looks=steps,
    )
    return {"steps": steps, "networks": seen}


@functools.partial(jax.jit, static_argnums=0)
def _look(model: Model, states: TrainState, probe: Examples) -> dict[str, jax.Array]:
    def of_replica(state: TrainState) -> dict[str, jax.Array]:
        params = state.params
        everything = isinstance(params[0], Layer)
        hidden = [layer.bias for layer in params[:-1]] if everything else params
        loss, _ = loss_of(model, params, state.batch_stats, probe, jax.random.key(0))
        return {"bias": optax.tree.norm(hidden), "loss": loss}

    return jax.vmap(of_replica)(states)


def draw(rows: Sequence[Row]) -> Figure:
    """A column what trains; above the biases, below the loss."""
    figure, panels = grid(2, len(rows))
    for column, row in zip(panels.T, rows, strict=True):
        for name, of in row["measured"]["networks"].items():
            for panel, key in zip(column, ("bias", "loss"), strict=True):
                values = np.array(of[key], float)
                draw_line(
                    *(panel, row["measured"]["steps"], name, values.mean(1)),
                    *(values.min(1), values.max(1)),
                )
        column[0].set_title(TRAINED[row["setting"]["trained"]], fontsize="medium")
        column[1].set_xlabel("training steps")
        column[1].set_ylim(0, 1.05 * column[1].dataLim.y1)
    panels[0, 0].set_ylabel("norm of the biases")
    panels[1, 0].set_ylabel("loss of a training batch")
    add_legend(figure)
    return figure


def tables(rows: Sequence[Row]) -> str:
    """Biases and losses at the start, in the middle and at the end."""
    cells, header = [], ["trained", "network"]
    steps = rows[0]["measured"]["steps"]
    chosen = (0, len(steps) // 2, len(steps) - 1)
    for label in ("norm of biases", "loss"):
        header += [f"{label} at {steps[at]}" for at in chosen]
    for row in rows:
        for name, of in row["measured"]["networks"].items():
            means = [
                float(np.array(of[key][at], float).mean())
                for key in ("bias", "loss")
                for at in chosen
            ]
            cells.append([TRAINED[row["setting"]["trained"]], LABELS[name], *means])
    return table(header, cells)


PART = Part("Normalising outside the gradient", settings, measure, draw, tables)
