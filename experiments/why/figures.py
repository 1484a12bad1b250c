"""What the parts' figures have in common."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.running.figures import (
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    VERMILION,
)
from experiments.running.tables import spread

LABELS = {
    "without": "without BN",
    "batch_norm": "with BN",
    "noisy": "with noisy BN",
    "normalised": "without BN, between normalised vectors",
    "mean_outside": "mean outside the gradient",
    "moments_outside": "mean and variance outside",
    "before": "BN before the nonlinearity",
    "after": "BN after it",
}
STYLES: Mapping[str, Mapping[str, Any]] = {
    "without": {"color": VERMILION, "linestyle": "--", "marker": "s"},
    "batch_norm": {"color": BLUE, "linestyle": "-", "marker": "o"},
    "noisy": {"color": GREEN, "linestyle": "-.", "marker": "^"},
    "normalised": {"color": ORANGE, "linestyle": ":", "marker": "v"},
    "mean_outside": {"color": VERMILION, "linestyle": "--", "marker": "s"},
    "moments_outside": {"color": PURPLE, "linestyle": "-.", "marker": "^"},
    "before": {"color": BLUE, "linestyle": "-", "marker": "o"},
    "after": {"color": GREEN, "linestyle": "-.", "marker": "^"},
}


def grid(rows: int, columns: int, *, sharey: Any = False) -> tuple[Figure, Any]:
    """A figure with panels, (rows, columns); its legend is drawn by `add_legend`."""
    figure = Figure(figsize=(1 + 3.6 * columns, 0.7 + 2.7 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=sharey)
    for panel in panels.flat:
        panel.grid(alpha=0.3)
    return figure, panels


def draw_line(
    panel: Any,
    x: Sequence[float],
    name: str,
    middle: Any,
    low: Any = None,
    high: Any = None,
) -> None:
    """A network's line, with a band where there is one."""
    style = dict(STYLES[name])
    panel.plot(x, middle, label=LABELS[name], markersize=3, lw=1.2, **style)
    if low is not None:
        panel.fill_between(x, low, high, color=style["color"], alpha=0.15, lw=0)


def draw_seeds(panel: Any, x: Sequence[float], name: str, values: Any) -> None:
    """The mean over seeds of (points, seeds), with the standard deviation as bars."""
    values = np.asarray(values, float)
    std = values.std(1, ddof=1) if values.shape[1] > 1 else np.zeros(len(values))
    panel.errorbar(
        x,
        values.mean(1),
        std,
        label=LABELS[name],
        markersize=4,
        lw=1.2,
        capsize=2,
        **STYLES[name],
    )


def add_legend(figure: Figure) -> None:
    """One legend of all panels, below them."""
    entries: dict[str, Any] = {}
    for panel in figure.axes:
        handles, labels = panel.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    figure.legend(
        entries.values(),
        entries.keys(),
        loc="outside lower center",
        ncols=len(entries),
        fontsize="small",
    )


def percent(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds, for a table."""
    std = np.std(values, ddof=1) if len(values) > 1 else None
    return spread({"mean": np.mean(values), "std": std}, 1)
