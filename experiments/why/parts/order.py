"""Batch normalisation before or after the nonlinearity."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.configuration.fields import as_tuple
from experiments.mnist.experiment import make_replicas
from experiments.running.tables import table
from experiments.why.data import Data
from experiments.why.figures import LABELS, add_legend, draw_seeds, grid, percent
from experiments.why.networks import WITHOUT
from experiments.why.part import Config, Measured, Part, Row, Setting
from experiments.why.subjects import mnist_network
from experiments.why.training import accuracy, per_seed, train

ORDERS: dict[str, dict[str, Any]] = {
    "without": {"normalisation": WITHOUT},
    "before": {"normalisation": "batch_norm", "norm_first": True},
    "after": {"normalisation": "batch_norm", "norm_first": False},
}


def settings(config: Config) -> list[dict[str, Any]]:
    """Each nonlinearity."""
    return [{"activation": each} for each in as_tuple(config["order_activations"])]


def measure(config: Config, data: Data, setting: Setting) -> Measured:
    """Test accuracy, (rates, seeds), for every order."""
    models = {
        name: mnist_network(config, data, activation=setting["activation"], **options)
        for name, options in ORDERS.items()
    }
    rates = as_tuple(config["order_rates"])
    replicas = make_replicas({**config, "learning_rate": rates})
    states = train(
        models,
        replicas,
        data.training,
        num_steps=config["order_steps"],
        batch_size=config["batch_size"],
    )
    return {
        "rates": list(rates),
        "networks": {
            name: per_seed(replicas, accuracy(model, states[name], data.test)).tolist()
            for name, model in models.items()
        },
    }


def draw(rows: Sequence[Row]) -> Figure:
    """Test accuracy over the rate, a panel a nonlinearity."""
    figure, (panels,) = grid(1, len(rows), sharey=True)
    lowest = 100.0
    for panel, row in zip(panels, rows, strict=True):
        for name, values in row["measured"]["networks"].items():
            draw_seeds(panel, row["measured"]["rates"], name, values)
        panel.set_xscale("log")
        panel.set_xlabel("learning rate")
        panel.set_title(row["setting"]["activation"], fontsize="medium")
        lowest = min(lowest, *np.ravel(list(row["measured"]["networks"].values())))
    panels[0].set_ylim(max(0, lowest - 5), 100)
    panels[0].set_ylabel("test accuracy, %")
    add_legend(figure)
    return figure


def tables(rows: Sequence[Row]) -> str:
    """Mean and deviation over seeds, a column a rate."""
    rates = rows[0]["measured"]["rates"]
    cells = [
        [row["setting"]["activation"], LABELS[name], *map(percent, values)]
        for row in rows
        for name, values in row["measured"]["networks"].items()
    ]
    header = ["nonlinearity", "network", *(f"rate {rate:g}" for rate in rates)]
    return "Test accuracy in %.\n\n" + table(header, cells)


PART = Part("Before or after the nonlinearity", settings, measure, draw, tables)
