"""Pictures of what the runs measured."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.mnist.summary import settings
from experiments.running.figures import BLACK, BLUE, VERMILION
from experiments.training.evaluation import PERCENTILES

LABELS = {"baseline": "without BN", "batch_norm": "with BN"}
STYLES = {
    "baseline": {"color": VERMILION, "linestyle": "--"},
    "batch_norm": {"color": BLUE, "linestyle": "-"},
}
MARKERS = {"baseline": "s", "batch_norm": "o"}
BEGINNING = 0.06  # the share of a run that figure 1 (a) shows enlarged


def figure1(
    rows: Sequence[Mapping[str, Any]],
    percentiles: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
) -> Figure:
    """The paper's figure 1: accuracy, and a sigmoid's input without and with BN.

    Args:
      rows: of metrics.jsonl.
      percentiles: of percentiles.jsonl; if there are none, only panel (a) is drawn.
      summary: of the run.
    """
    panels = 3 if percentiles else 1
    figure = Figure(figsize=(4.5 * panels, 3.6), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    _accuracy_panel(axes[0], rows)
    axes[0].set_title("(a) test accuracy" if percentiles else "test accuracy")
    if percentiles:
        for panel, letter, name in zip(axes[1:], "bc", LABELS, strict=True):
            (entry,) = summary["networks"][name]
            _percentile_panel(
                panel,
                [row for row in percentiles if row["network"] == name],
                entry["sigmoid_input"]["typical_unit"],
            )
            panel.set_title(f"({letter}) a sigmoid's input, {LABELS[name]}")
        lows, highs = zip(*(panel.get_ylim() for panel in axes[1:]), strict=True)
        for panel in axes[1:]:
            # One scale for both, with room for the legend.
            panel.set_ylim(min(*lows, -2), max(*highs, 2) * 1.25)
    return figure


def accuracy_against_rate(summary: Mapping[str, Any]) -> Figure:
    """Final test accuracy over the learning rate, a panel an initial deviation."""
    deviations = sorted({std for _, std in settings(summary)})
    figure = Figure(figsize=(4 * len(deviations), 3.6), layout="constrained")
    axes = figure.subplots(1, len(deviations), sharey=True, squeeze=False)[0]
    last = str(summary["config"]["num_steps"])
    for panel, std in zip(axes, deviations, strict=True):
        for name, entries in summary["networks"].items():
            points = sorted(
                (entry["learning_rate"], entry["accuracy"][last]["moving_average"])
                for entry in entries
                if entry["initial_std"] == std
            )
            panel.errorbar(
                [rate for rate, _ in points],
                [accuracy["mean"] for _, accuracy in points],
                yerr=[accuracy["std"] or 0 for _, accuracy in points],
                marker=MARKERS[name],
                capsize=2,
                label=LABELS[name],
                **STYLES[name],
            )
        panel.set_xscale("log")
        panel.set_xlabel("learning rate")
        panel.set_title(f"initial weights' std {std:g}")
        panel.set_ylim(0, 100)
        panel.grid(alpha=0.3)
    axes[0].set_ylabel(f"test accuracy after {int(last):,} steps, %")
    axes[0].legend()
    return figure


def _accuracy_panel(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    last = rows[-1]["step"]
    beginning = axes.inset_axes((0.4, 0.4, 0.56, 0.4))
    for name, label in LABELS.items():
        own = [row for row in rows if row["network"] == name]
        steps = [row["step"] for row in own]
        fraction = np.array([row["accuracy"] for row in own]) / 100
        mean, seeds = fraction.mean(axis=1), fraction.shape[1]
        std = fraction.std(axis=1, ddof=1) if seeds > 1 else np.zeros_like(mean)
        for panel in (axes, beginning):
            panel.plot(steps, mean, label=label, **STYLES[name])
            color = STYLES[name]["color"]
            panel.fill_between(
                steps, mean - std, mean + std, color=color, alpha=0.2, lw=0
            )
    for panel, end in ((axes, last), (beginning, last * BEGINNING)):
        panel.set_ylim(0.7, 1)
        panel.set_xlim(0, end)
        panel.xaxis.set_major_formatter(_thousands)
        panel.grid(alpha=0.3)
    beginning.tick_params(labelsize="small")
    beginning.set_title("the beginning", fontsize="small")
    axes.set_xlabel("training steps")
    axes.set_ylabel(f"fraction correct (mean ± std of {seeds} seeds)")
    axes.legend(loc="lower right", ncols=2, fontsize="small")


def _percentile_panel(axes: Any, rows: Sequence[Mapping[str, Any]], unit: int) -> None:
    steps = [row["step"] for row in rows]
    tracks = np.array([np.array(row["values"], float)[0, :, unit] for row in rows])
    for track, percentile, style in zip(
        tracks.T, PERCENTILES, (":", "-", "--"), strict=True
    ):
        label = f"{percentile}th"
        axes.plot(steps, track, color=BLACK, linestyle=style, lw=1, label=label)
    axes.set_xlim(0, steps[-1])
    axes.xaxis.set_major_formatter(_thousands)
    axes.set_xlabel("training steps")
    axes.set_ylabel("percentiles over test images")
    axes.legend(loc="upper center", ncols=3, fontsize="small")
    axes.grid(alpha=0.3)


def _thousands(value: float, _: int) -> str:
    return f"{value / 1000:g}K" if value >= 1000 else f"{value:g}"
