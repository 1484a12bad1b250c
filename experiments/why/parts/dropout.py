"""Dropout beside batch normalisation (section 3.4)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.configuration.fields import as_tuple
from experiments.mnist.experiment import make_replicas
from experiments.running.tables import table
from experiments.why.data import Data, first
from experiments.why.figures import LABELS, add_legend, draw_seeds, grid, percent
from experiments.why.networks import WITHOUT
from experiments.why.part import Config, Measured, Part, Row, Setting
from experiments.why.subjects import mnist_network
from experiments.why.training import accuracy, train

SPLITS = ("training", "test")


def settings(config: Config) -> list[dict[str, Any]]:
    """Each share of dropout."""
    return [{"dropout": share} for share in as_tuple(config["dropouts"])]


def measure(config: Config, data: Data, setting: Setting) -> Measured:
    """Accuracy on both splits, (seeds), for both networks."""
    models = {
        name: mnist_network(
            config,
            data,
            normalisation=name,
            activation="relu",
            dropout_rate=setting["dropout"],
        )
        for name in (WITHOUT, "batch_norm")
    }
    replicas = make_replicas(
        {**config, "learning_rate": config["dropout_learning_rate"]}
    )
    few = first(data.training, config["dropout_examples"])
    states = train(
        models,
        replicas,
        few,
        num_steps=config["dropout_steps"],
        batch_size=config["batch_size"],
    )
    splits = dict(zip(SPLITS, (few, data.test), strict=True))
    return {
        "networks": {
            name: {
                split: np.asarray(accuracy(model, states[name], examples)).tolist()
                for split, examples in splits.items()
            }
            for name, model in models.items()
        }
    }


def draw(rows: Sequence[Row]) -> Figure:
    """Accuracy over dropout, a panel a split."""
    figure, (panels,) = grid(1, len(SPLITS))
    for panel, split in zip(panels, SPLITS, strict=True):
        lowest = 100.0
        for name in rows[0]["measured"]["networks"]:
            values = [row["measured"]["networks"][name][split] for row in rows]
            shares = [100 * row["setting"]["dropout"] for row in rows]
            draw_seeds(panel, shares, name, values)
            lowest = min(lowest, *np.ravel(values))
        panel.set_ylim(lowest - 0.1 * (100 - lowest), 100)
        panel.set_xlabel("dropout, % of units")
        panel.set_title(f"{split} examples", fontsize="medium")
    panels[0].set_ylabel("accuracy, %")
    add_legend(figure)
    return figure


def tables(rows: Sequence[Row]) -> str:
    """Mean and deviation over seeds, a column a share."""
    cells = [
        [
            LABELS[name],
            split,
            *(percent(row["measured"]["networks"][name][split]) for row in rows),
        ]
        for name in rows[0]["measured"]["networks"]
        for split in SPLITS
    ]
    shares = [f"{100 * row['setting']['dropout']:g}%" for row in rows]
    return "Accuracy in %.\n\n" + table(["network", "examples", *shares], cells)


PART = Part("Dropout with batch normalisation", settings, measure, draw, tables)
