"""Which depths and initial deviations train, with and without."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.configuration.fields import as_tuple
from experiments.mnist.experiment import make_replicas
from experiments.running.tables import table
from experiments.why.data import Data
from experiments.why.figures import LABELS
from experiments.why.networks import WITHOUT, deep_mlp
from experiments.why.part import Config, Measured, Part, Row, Setting
from experiments.why.training import accuracy, train

NETWORKS = (WITHOUT, "batch_norm")
BRIGHT = 55  # percent from which text on the colour is black


def settings(config: Config) -> list[dict[str, Any]]:
    """Each nonlinearity at each depth."""
    return [
        {"activation": activation, "depth": depth}
        for activation in as_tuple(config["depth_activations"])
        for depth in as_tuple(config["depths"])
    ]


def measure(config: Config, data: Data, setting: Setting) -> Measured:
    """Test accuracy, (rates, deviations), for both networks."""
    models = {
        name: deep_mlp(
            data.num_inputs,
            setting["depth"],
            config["depth_width"],
            data.num_classes,
            batch_norm=name != WITHOUT,
            activation=setting["activation"],
            decay=config["depth_decay"],
            epsilon=config["epsilon"],
        )
        for name in NETWORKS
    }
    rates, stds = as_tuple(config["depth_rates"]), as_tuple(config["depth_stds"])
    replicas = make_replicas(
        {**config, "num_seeds": 1, "learning_rate": rates, "initial_std": stds}
    )
    states = train(
        models,
        replicas,
        data.training,
        num_steps=config["depth_steps"],
        batch_size=config["batch_size"],
    )
    return {
        "rates": list(rates),
        "stds": list(stds),
        "networks": {
            name: np.asarray(accuracy(model, states[name], data.test))
            .reshape(len(rates), len(stds))
            .tolist()
            for name, model in models.items()
        },
    }


def draw(rows: Sequence[Row]) -> Figure:
    """A map a nonlinearity and network: accuracy by depth and deviation."""
    activations = list(dict.fromkeys(row["setting"]["activation"] for row in rows))
    figure = Figure(figsize=(10, 0.6 + 2.8 * len(activations)), layout="constrained")
    panels = figure.subplots(len(activations), len(NETWORKS), squeeze=False)
    for line, activation in zip(panels, activations, strict=True):
        chosen = [row for row in rows if row["setting"]["activation"] == activation]
        stds = chosen[0]["measured"]["stds"]
        for panel, name in zip(line, NETWORKS, strict=True):
            values = np.array([_best(row, name) for row in chosen])
            shown = panel.imshow(
                values, vmin=0, vmax=100, cmap="cividis", aspect="auto", origin="lower"
            )
            for (y, x), value in np.ndenumerate(values):
                color = "black" if value > BRIGHT else "white"
                panel.text(x, y, f"{value:.0f}", ha="center", va="center", color=color)
            panel.set_xticks(range(len(stds)), [f"{std:g}" for std in stds])
            depths = [str(row["setting"]["depth"]) for row in chosen]
            panel.set_yticks(range(len(depths)), depths)
            panel.set_title(f"{activation}, {LABELS[name]}", fontsize="medium")
        line[0].set_ylabel("hidden layers")
    for panel in panels[-1]:
        panel.set_xlabel("initial deviation · sqrt(inputs)")
    figure.colorbar(shown, ax=panels, label="test accuracy, %")
    return figure


def tables(rows: Sequence[Row]) -> str:
    """Accuracy at the better rate, a column a deviation."""
    stds = rows[0]["measured"]["stds"]
    cells = [
        [
            row["setting"]["activation"],
            str(row["setting"]["depth"]),
            LABELS[name],
            *(f"{value:.1f}" for value in _best(row, name)),
        ]
        for row in rows
        for name in NETWORKS
    ]
    header = ["nonlinearity", "layers", "network", *(f"std {std:g}" for std in stds)]
    return "Test accuracy in %.\n\n" + table(header, cells)


def _best(row: Row, name: str) -> np.ndarray:
    """The better rate's accuracy for each deviation."""
    best: np.ndarray = np.array(row["measured"]["networks"][name], float).max(0)
    return best


PART = Part(
    "What trains, by depth and initial weights", settings, measure, draw, tables
)
