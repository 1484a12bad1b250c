"""Internal covariate shift, while networks train."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from experiments.running.tables import table
from experiments.training.state import TrainState
from experiments.why import subjects
from experiments.why.data import Data
from experiments.why.figures import LABELS, add_legend, draw_line, grid
from experiments.why.networks import Model
from experiments.why.part import Config, Measured, Part, Row, Setting
from experiments.why.probes.covariate_shift import Shift, covariate_shift
from experiments.why.training import Examples, States, loss_of

MEASURES = {
    "l2": "change of the gradient, L2",
    "relative": "the same / gradient",
    "cosine": "cosine of both",
}


def measure(config: Config, data: Data, setting: Setting) -> Measured:
    """The shift by a step of SGD, (looks, seeds, layers), for every network."""
    subject = subjects.make(config, data, setting)
    seen: dict[str, list[Shift]] = {name: [] for name in subject.models}

    def look(_: int, states: States) -> None:
        for name, model in subject.models.items():
            found = _look(
                model,
                states[name],
                subject.probe,
                setting["learning_rate"],
                subject.replicas[0],
            )
            seen[name].append(jax.tree.map(np.asarray, found))

    subjects.train_and_look(subject, look)
    return {
        "steps": list(subject.looks),
        "networks": {
            name: {
                key: [getattr(each, key).tolist() for each in found] for key in MEASURES
            }
            for name, found in seen.items()
        },
    }


@functools.partial(jax.jit, static_argnums=0)
def _look(
    model: Model, states: TrainState, probe: Examples, rate: Any, seeds: Any
) -> Shift:
    def of_replica(state: TrainState, seed: jax.Array) -> Shift:
        # Noise belongs to the step: the same on both sides.
        key = jax.random.fold_in(jax.random.key(seed), state.step)

        def loss(layers: Any) -> jax.Array:
            return loss_of(model, tuple(layers), state.batch_stats, probe, key)[0]

        gradient = jax.grad(loss)(state.params)
        moved = jax.tree.map(lambda w, g: w - rate * g, state.params, gradient)
        return covariate_shift(loss, state.params, moved)

    return model.over_replicas(of_replica)(states, seeds)


def draw(rows: Sequence[Row]) -> Figure:
    """A column a setting, a row a measure; means over the layers after the first."""
    figure, panels = grid(len(MEASURES), len(rows))
    for column, row in zip(panels.T, rows, strict=True):
        steps = row["measured"]["steps"]
        for name, measured in row["measured"]["networks"].items():
            for panel, key in zip(column, MEASURES, strict=True):
                draw_line(panel, steps, name, _later_layers(measured[key]).mean((1, 2)))
        for panel in column[:2]:
            panel.set_yscale("log")
        lowest, _ = column[2].get_ylim()
        column[2].set_ylim(lowest, 1 + 0.05 * (1 - lowest))
        column[0].set_title(subjects.describe(row["setting"]), fontsize="medium")
        column[-1].set_xlabel("training steps")
    for panel, label in zip(panels[:, 0], MEASURES.values(), strict=True):
        panel.set_ylabel(label)
    add_legend(figure)
    return figure


def tables(rows: Sequence[Row]) -> str:
    """Means over the looks after the first, over seeds, and over layers."""
    cells = []
    for row in rows:
        for name, measured in row["measured"]["networks"].items():
            means = [float(_later_layers(measured[key])[1:].mean()) for key in MEASURES]
            cells.append([subjects.describe(row["setting"]), LABELS[name], *means])
    return table(["setting", "network", *MEASURES.values()], cells)


def _later_layers(values: Any) -> np.ndarray:
    """Without the first layer, which has none before it."""
    return np.array(values, float)[:, :, 1:]


PART = Part("Internal covariate shift", subjects.settings, measure, draw, tables)
