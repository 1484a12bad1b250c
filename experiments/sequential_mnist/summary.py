"""What a run showed: numbers beside the paper's, a table and a figure."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.running import provenance
from experiments.running.tables import spread, table
from experiments.sequential_mnist.config import NETWORKS

# Cooijmans et al. 2016: test accuracy in percent, pixel by pixel.
PAPER = {
    "lstm": 98.9,
    "bn_lstm": 99.0,
    "permuted_lstm": 90.2,
    "permuted_bn_lstm": 95.4,
}
STYLES = {
    False: {"label": "LSTM", "color": "tab:red", "linestyle": "--"},
    True: {"label": "BN-LSTM", "color": "tab:blue", "linestyle": "-"},
}
LEVELS = (90, 95)  # percent


def summarise(
    config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The summary of a finished run, as JSON values.

    Args:
      config: the run's configuration.
      rows: of metrics.jsonl.

    Returns:
      For each network accuracies over steps, in the end by moving averages and by the
      population's statistics (Algorithm 2), and the paper's.
    """
    networks = {}
    trained = {row["network"] for row in rows}
    for name in (name for name in NETWORKS if name in trained):
        of_network = [row for row in rows if row["network"] == name]
        networks[name] = {
            "steps": [row["step"] for row in of_network],
            "accuracy": [row["accuracy"] for row in of_network],
            "loss": [row.get("loss") for row in of_network],
            "moving_average": _statistics(of_network[-1]["accuracy"]),
            "population": _statistics(of_network[-1]["population_accuracy"]),
            "paper": PAPER[name],
        }
    return {**provenance.describe(), "config": dict(config), "networks": networks}


def page(summary: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    config = summary["config"]
    rows = []
    for name, of in summary["networks"].items():
        mean = np.mean(of["accuracy"], axis=1)
        reached = [
            next(
                (s for s, a in zip(of["steps"], mean, strict=True) if a >= level), None
            )
            for level in LEVELS
        ]
        rows.append(
            [
                name,
                spread(of["moving_average"]),
                spread(of["population"]),
                *("never" if step is None else f"{step:,}" for step in reached),
                f"{of['paper']:.1f}",
            ]
        )
    header = ["network", "accuracy, %", "by Algorithm 2, %"]
    header += [f"steps to {level}%" for level in LEVELS] + ["paper, pixel by pixel, %"]
    return (
        f"Test accuracy after {config['num_steps']:,} steps of {config['batch_size']}, "
        f"{config['pixels_per_step']} pixels a time step, mean and standard deviation "
        f"of {config['num_seeds']} seeds:\n\n{table(header, rows)}\n"
    )


def draw(summary: Mapping[str, Any]) -> Figure:
    """Accuracy over training steps: in order, and permuted."""
    panels = sorted({NETWORKS[name][1] for name in summary["networks"]})
    figure = Figure(figsize=(4.5 * len(panels), 3.6), layout="constrained")
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, permuted in zip(all_axes, panels, strict=True):
        for name, of in summary["networks"].items():
            batch_norm, is_permuted = NETWORKS[name]
            if is_permuted != permuted:
                continue
            accuracy = np.array(of["accuracy"], float)
            style = STYLES[batch_norm]
            axes.plot(of["steps"], accuracy.mean(axis=1), **style)
            axes.fill_between(
                of["steps"],
                accuracy.min(axis=1),
                accuracy.max(axis=1),
                color=style["color"],
                alpha=0.2,
                lw=0,
            )
        axes.set_title("permuted" if permuted else "in order")
        axes.set_xlabel("training steps")
        axes.set_xlim(0, summary["config"]["num_steps"])
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")
    left = figure.axes[0]
    left.set_ylabel("test accuracy, % (mean and range of seeds)")
    left.set_ylim(70, 100)
    return figure


def _statistics(values: Sequence[float]) -> dict[str, Any]:
    """Mean and sample standard deviation over seeds."""
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": std, "values": list(values)}
