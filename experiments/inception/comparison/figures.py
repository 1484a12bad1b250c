"""Pictures of compared runs: the paper's figures 2 and 3, and accuracy against rate."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.inception.comparison.models import FINISHED
from experiments.inception.comparison.tables import (
    digits_to_show,
    level_in_words,
    steps_in_words,
)
from experiments.running.figures import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
)
from experiments.running.tables import spread

# After the palette two darker ones. The styles help where colours alone do not.
COLORS = (
    *(BLACK, BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY),
    *("#882255", GREY, "#808000"),
)
LINESTYLES = ("-", "--", "-.", ":")
LEVEL_MARKS = "Dvsp^<"  # where a curve reaches each reference's level
LINE_WIDTH = 36  # characters, before a name goes on in the next line
LOG_FROM = 50  # the ratio of steps from which a linear axis hides the shorter bars
POINTS = {"x": "diverged", "+": "stayed at chance", "s": "not finished"}
CROWDED = 8  # rates, from which their labels are turned
# The share of the longest run below which the shortest is shown in a panel of its own.
SHORT = 0.5

Comparison = Mapping[str, Any]
Model = Mapping[str, Any]


def figure2(comparison: Comparison) -> Figure:
    """Accuracy against training steps, all models in one picture.

    Args:
      comparison: as `experiments.inception.comparison.models.compare` makes it.
    """
    models, digits = comparison["models"], digits_to_show(comparison)
    levels = _levels(comparison)
    limits = _limits(models)
    figure = Figure(figsize=(4 + 4.5 * len(limits), 4.5), layout="constrained")
    panels = figure.subplots(1, len(limits), sharey=True, squeeze=False)[0]
    highest = max(max(model["curve"]["mean"]) for model in models)
    for panel, limit in zip(panels, limits, strict=True):
        for reference in levels.values():
            panel.axhline(reference["level"], color="0.6", lw=0.8, zorder=0)
        for index, model in enumerate(models):
            _draw_curve(panel, model, line_style(index))
        # A little more than the data, for marks and lines that lie at the border.
        panel.set_xlim(0, 1.015 * limit or 1)
        panel.set_ylim(-0.02 * highest, min(100, 1.08 * highest))
        panel.xaxis.set_major_formatter(_thousands_and_millions)
        panel.set_xlabel("training steps")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("validation accuracy, %")
    titles = ("whole runs", "the beginning") if len(limits) > 1 else ("",)
    for panel, title in zip(panels, titles, strict=True):
        panel.set_title(title, fontsize="medium")
    for place, reference in levels.items():
        words = f"first to reach {level_in_words(reference, digits)}"
        _mark(panels[0], np.nan, np.nan, LEVEL_MARKS[place], "0.4", words)
    if any(model["diverged"] for model in models):
        _mark(panels[0], np.nan, np.nan, "X", "0.4", "diverged after this evaluation")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside right upper", fontsize="small", handlelength=3
    )
    return figure


def figure3(comparison: Comparison) -> Figure:
    """Bars: every model's steps to each reference's best accuracy, and its own best.

    Args:
      comparison: as `experiments.inception.comparison.models.compare` makes it.
    """
    models, digits = comparison["models"], digits_to_show(comparison)
    levels = _levels(comparison)
    size = (3 + 3.5 * (1 + len(levels)), 1.5 + 0.5 * len(models))
    figure = Figure(figsize=size, layout="constrained")
    *panels, last = figure.subplots(1, len(levels) + 1, sharey=True, squeeze=False)[0]
    names = [_wrapped(model["name"]) for model in models]
    last.set_yticks(range(len(models)), names)
    last.set_ylim(len(models) - 0.5, -0.5)
    for panel, (place, reference) in zip(panels, levels.items(), strict=True):
        level = level_in_words(reference, digits)
        panel.set_xlabel(f"steps to {level}\n({_wrapped(reference['name'])})")
        _bars_of_steps(panel, [model["reach"][place] for model in models])
    last.set_xlabel("best accuracy, %")
    _bars_of_accuracy(last, models, levels.values(), digits)
    return figure


def accuracy_against_rate(comparison: Comparison) -> Figure:
    """Best accuracy over the learning rate, a line a family; failures are crosses.

    Args:
      comparison: as `experiments.inception.comparison.models.compare_rates` makes it.
    """
    families = comparison["families"]
    points = [point for family in families for point in family["points"]]
    rates = sorted({point["initial_rate"] for point in points})
    # Crosses have a panel of their own, a row a family, so that none hides another.
    heights = [4.2, 0.2 + 0.2 * len(families)][: 1 + any(map(_failed, points))]
    figure = Figure(figsize=(9.5, sum(heights)), layout="constrained")
    panels = figure.subplots(
        len(heights), sharex=True, squeeze=False, height_ratios=heights
    )[:, 0]
    axes, last = panels[0], panels[-1]
    for index, family in enumerate(families):
        _draw_family(panels, index, family)
    axes.set_xscale("log")
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()
    axes.set_ylim(0, 100)
    axes.set_ylabel("best accuracy, %")
    if last is not axes:
        last.set_ylim(len(families) - 0.4, -0.6)
        last.set_yticks([])
        last.set_ylabel("failed", rotation=0, ha="right", va="center")
    last.set_xlabel("initial learning rate")
    last.tick_params("x", labelrotation=45 if len(rates) > CROWDED else 0)
    for panel in panels:
        panel.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    for marker, label in POINTS.items():
        if any(_marker(point) == marker for point in points):
            handles += _point(axes, np.nan, np.nan, marker, "0.4")
            labels.append(label)
    figure.legend(
        handles, labels, loc="outside right upper", fontsize="small", handlelength=3
    )
    return figure


def _levels(comparison: Comparison) -> dict[int, Mapping[str, Any]]:
    """The references that learnt something, by their place among all of them."""
    return {
        place: reference
        for place, reference in enumerate(comparison["references"])
        if reference["level"] is not None
    }


def line_style(index: int) -> dict[str, Any]:
    """Colour and line style of the model or family in this place."""
    return {
        "color": COLORS[index % len(COLORS)],
        "linestyle": LINESTYLES[index % len(LINESTYLES)],
    }


def _limits(models: Sequence[Model]) -> list[int]:
    """The last step of the panel of all runs, and of one for short runs, if any."""
    longest = max(model["curve"]["steps"][-1] for model in models)
    ended = [model for model in models if model["finished"] and not model["diverged"]]
    ends = [model["curve"]["steps"][-1] for model in ended]
    short = [end for end in ends if 0 < end < SHORT * longest]
    return [longest, max(short)] if short else [longest]


def _draw_family(panels: Any, index: int, family: Mapping[str, Any]) -> None:
    style = line_style(index)
    points = family["points"]
    panels[0].errorbar(
        [point["initial_rate"] for point in points],
        # The line breaks where a rate failed.
        [np.nan if _failed(point) else point["best"]["mean"] for point in points],
        yerr=[point["best"]["std"] or 0 for point in points],
        capsize=2,
        label=_wrapped(family["name"]),
        **style,
    )
    for point in points:
        rate, marker, color = point["initial_rate"], _marker(point), style["color"]
        if _failed(point):
            _point(panels[1], rate, index, marker, color)
        else:
            _point(panels[0], rate, point["best"]["mean"], marker, color)


def _draw_curve(axes: Any, model: Model, style: Mapping[str, Any]) -> None:
    curve, color = model["curve"], style["color"]
    steps, mean = np.array(curve["steps"]), np.array(curve["mean"])
    label = _wrapped(model["name"])
    if model["state"] != FINISHED:
        label += "\n" + _wrapped(model["state"])
    axes.plot(steps, mean, label=label, lw=1.5, **style)
    if curve["std"] is not None:
        std = np.array(curve["std"])
        axes.fill_between(steps, mean - std, mean + std, color=color, alpha=0.2, lw=0)
    if model["diverged"]:
        _mark(axes, steps[-1], mean[-1], "X", color)
    for marker, reach in zip(LEVEL_MARKS, model["reach"], strict=False):
        step = reach["steps"]
        if step is not None:
            _mark(axes, step, mean[steps == step][0], marker, color)


def _bars_of_steps(axes: Any, reaches: Sequence[Mapping[str, Any]]) -> None:
    steps = [reach["steps"] for reach in reaches if reach["steps"]] or [1]
    start, longest = 0.0, max(steps)
    # The numbers, too, need room: as a share of the axis, whatever its scale.
    axes.set_xlim(0, 1.8 * longest)
    if longest > LOG_FROM * min(steps):
        start = 10 ** np.floor(np.log10(min(steps) / 2))
        axes.set_xscale("log")
        axes.set_xlim(start, start * (longest / start) ** 1.8)
    for position, reach in enumerate(reaches):
        words = steps_in_words(reach)
        if reach["steps"]:
            color = line_style(position)["color"]
            axes.barh(
                position, reach["steps"] - start, left=start, color=color, height=0.6
            )
        if reach["ratio"] is not None:
            words += f" ({reach['ratio']:,.2f}x)"
        _write(axes, reach["steps"] or start, position, words)
    axes.xaxis.set_major_formatter(_thousands_and_millions)


def _bars_of_accuracy(
    axes: Any,
    models: Sequence[Model],
    references: Iterable[Mapping[str, Any]],
    digits: int,
) -> None:
    for reference in references:
        axes.axvline(reference["level"], color="0.4", linestyle="--", lw=0.8)
    for position, model in enumerate(models):
        mean, std = model["best"]["mean"], model["best"]["std"] or 0
        color = line_style(position)["color"]
        axes.barh(position, mean, color=color, height=0.6)
        if std:
            axes.errorbar(mean, position, xerr=std, color="0.5", capsize=2)
        _write(axes, mean + std, position, spread(model["best"], digits))
    axes.set_xlim(0, 1.4 * max(model["best"]["mean"] for model in models) or 1)
    axes.set_xticks([tick for tick in axes.get_xticks() if tick <= 100])


def _failed(model: Model) -> bool:
    return bool(model["diverged"] or model["at_chance"])


def _wrapped(text: str) -> str:
    return textwrap.fill(text, LINE_WIDTH, break_long_words=False)


def _marker(point: Model) -> str:
    if _failed(point):
        return "x" if point["diverged"] else "+"
    return "o" if point["state"] == FINISHED else "s"


def _mark(
    axes: Any, step: float, value: float, marker: str, color: str, label: str = ""
) -> None:
    """A mark on a curve, or only its entry in the legend."""
    edge = {"markersize": 8, "markeredgecolor": "white", "zorder": 3}
    _point(axes, step, value, marker, color, label=label or None, **edge)


def _point(
    axes: Any, x: float, y: float, marker: str, color: str, **options: Any
) -> Any:
    return axes.plot([x], [y], marker, color=color, **options)


def _write(axes: Any, x: float, y: float, words: str) -> None:
    """Text to the right of a bar's end."""
    axes.annotate(
        _wrapped(words),
        (x, y),
        (5, 0),
        textcoords="offset points",
        va="center",
        fontsize="small",
        bbox={"color": "white", "pad": 0.5},
    )


def _thousands_and_millions(value: float, _: float) -> str:
    for unit, letter in ((1e6, "M"), (1e3, "K")):
        if value >= unit:
            return f"{value / unit:g}{letter}"
    return f"{value:g}"
