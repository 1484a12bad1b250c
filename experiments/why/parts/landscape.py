"""Loss and gradient along the gradient, while networks train."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from experiments.configuration.fields import as_tuple
from experiments.running.tables import table
from experiments.training.state import TrainState
from experiments.why import subjects
from experiments.why.data import Data
from experiments.why.figures import LABELS, add_legend, draw_line, grid
from experiments.why.networks import Model
from experiments.why.part import Config, Measured, Part, Row, Setting
from experiments.why.probes.loss_landscape import Landscape, along_gradient
from experiments.why.training import Examples, States, loss_of


def measure(config: Config, data: Data, setting: Setting) -> Measured:
    """Ranges over the step sizes, (looks, seeds) each, for every network."""
    subject = subjects.make(config, data, setting)
    rate = setting["learning_rate"]
    sizes = np.array([rate * factor for factor in as_tuple(config["step_factors"])])
    seen: dict[str, list[dict[str, Any]]] = {name: [] for name in subject.models}

    def look(_: int, states: States) -> None:
        for name, model in subject.models.items():
            found = _look(
                model, states[name], subject.probe, sizes, subject.replicas[0]
            )
            seen[name].append(_ranges(jax.tree.map(np.asarray, found)))

    subjects.train_and_look(subject, look)
    return {
        "steps": list(subject.looks),
        "networks": {
            name: {key: [each[key] for each in found] for key in found[0]}
            for name, found in seen.items()
        },
    }


@functools.partial(jax.jit, static_argnums=0)
def _look(
    model: Model, states: TrainState, probe: Examples, sizes: Any, seeds: Any
) -> Landscape:
    def of_replica(state: TrainState, seed: jax.Array) -> Landscape:
        key = jax.random.fold_in(jax.random.key(seed), state.step)

        def loss(params: Any) -> jax.Array:
            return loss_of(model, params, state.batch_stats, probe, key)[0]

        return along_gradient(loss, state.params, sizes)

    return model.over_replicas(of_replica)(states, seeds)


def _ranges(found: Landscape) -> dict[str, Any]:
    """Of (seeds, step sizes), or of (seeds)."""
    return {
        "loss": found.loss.tolist(),
        "gradient_norm": found.gradient_norm.tolist(),
        "loss_low": found.losses.min(1).tolist(),
        "loss_high": found.losses.max(1).tolist(),
        "change_low": found.gradient_changes.min(1).tolist(),
        "change_high": found.gradient_changes.max(1).tolist(),
        "smoothness": found.smoothness.max(1).tolist(),
    }


def draw(rows: Sequence[Row]) -> Figure:
    """Figure 4 of Santurkar et al.: a column a setting, a row a measure."""
    figure, panels = grid(3, len(rows))
    for column, row in zip(panels.T, rows, strict=True):
        steps = row["measured"]["steps"]
        for name, lists in row["measured"]["networks"].items():
            of = {key: np.array(values, float).mean(1) for key, values in lists.items()}
            middle = np.sqrt(of["change_low"] * of["change_high"])
            draw_line(
                column[0], steps, name, of["loss"], of["loss_low"], of["loss_high"]
            )
            draw_line(
                column[1], steps, name, middle, of["change_low"], of["change_high"]
            )
            draw_line(column[2], steps, name, of["smoothness"])
        column[0].set_title(subjects.describe(row["setting"]), fontsize="medium")
        column[-1].set_xlabel("training steps")
        for panel in column:
            panel.set_yscale("log")
    names = ("loss, along the gradient", "change of the gradient, L2", "effective β")
    for panel, name in zip(panels[:, 0], names, strict=True):
        panel.set_ylabel(name)
    add_legend(figure)
    return figure


def tables(rows: Sequence[Row]) -> str:
    """Means over the looks after the first and over seeds."""
    cells = []
    for row in rows:
        for name, lists in row["measured"]["networks"].items():
            of = {key: np.array(each, float)[1:] for key, each in lists.items()}
            cells.append(
                [
                    subjects.describe(row["setting"]),
                    LABELS[name],
                    float(of["loss"][-1].mean()),
                    float((of["loss_high"] - of["loss_low"]).mean()),
                    float((of["change_high"] / of["gradient_norm"]).mean()),
                    float(of["change_high"].mean()),
                    float(of["smoothness"].mean()),
                ]
            )
    header = ["setting", "network", "loss at the end", "range of the loss"]
    header += ["largest change / gradient", "largest change, L2", "effective β"]
    return table(header, cells)


PART = Part("Along the gradient", subjects.settings, measure, draw, tables)
