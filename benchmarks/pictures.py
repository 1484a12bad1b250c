"""The pictures of docs/performance.md; a library looks the same in all of them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

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

TRAINING = "forward and backward"


class Style(NamedTuple):
    """How a library, or a kind of number, is drawn: as a bar and as a line."""

    color: str
    hatch: str
    linestyle: str = "-"
    marker: str = "o"

    @property
    def bar(self) -> dict[str, Any]:
        """Arguments of a bar."""
        return {"color": self.color, "hatch": self.hatch, "edgecolor": "white"}

    @property
    def line(self) -> dict[str, Any]:
        """Arguments of a line."""
        return {
            "color": self.color,
            "linestyle": self.linestyle,
            "marker": self.marker,
        }


STYLES = {
    "bn_jax": Style(BLUE, ""),
    "bn_jax, rematerialised": Style(SKY, "//"),
    "flax.linen": Style(VERMILION, "\\\\", "--", "s"),
    "flax.linen, two passes": Style(VERMILION, "xx"),
    "flax.nnx": Style(ORANGE, "--"),
    "haiku": Style(GREEN, ".."),
    "equinox": Style(PURPLE, "++"),
    "keras on jax": Style(SKY, "oo"),
    "torch": Style(BLACK, "//", ":", "^"),
    "no normalisation": Style(GREY, ".."),
    "float32": Style(GREEN, ""),
    "bfloat16": Style(ORANGE, "//"),
    "decoder": Style(GREEN, "", "--", "s"),
    "state": Style(GREEN, "", "-", "D"),
    "checkpoint": Style(PURPLE, "", "-.", "v"),
}


def style_of(name: str) -> Style:
    """Of the library that a contestant's name begins with, or contains."""
    if name in STYLES:
        return STYLES[name]
    found = [key for key in ("bn_jax", "torch", "flax", "decoder") if key in name]
    known = {"flax": "flax.linen"}
    return (
        STYLES[known.get(found[0], found[0])] if found else STYLES["no normalisation"]
    )


def select(rows: Sequence[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    """The rows that have these values."""
    return [row for row in rows if all(row[key] == wanted[key] for key in wanted)]


def shape_of(row: dict[str, Any]) -> str:
    """A row's shape in words."""
    return "x".join(map(str, row["shape"]))


def draw_op(content: dict[str, Any]) -> Figure:
    """Share of the limit by shape, a panel a dtype."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    for panel, dtype in zip(panels, ("float32", "bfloat16"), strict=True):
        rows = select(content["rows"], dtype=dtype, passes=TRAINING, relu=True)
        rows = [row for row in rows if row["name"] != "copy" and len(row["shape"]) == 4]
        shapes = list(dict.fromkeys(map(shape_of, rows)))
        names = list(dict.fromkeys(row["name"] for row in rows))
        width = 0.85 / len(names)
        for number, name in enumerate(names):
            own = {
                shape_of(row): row["share_of_limit"]
                for row in rows
                if row["name"] == name
            }
            panel.bar(
                np.arange(len(shapes)) + (number - len(names) / 2 + 0.5) * width,
                [own[shape] for shape in shapes],
                width,
                label=name,
                **style_of(name).bar,
            )
        panel.axhline(
            1,
            color=BLACK,
            linewidth=0.8,
            linestyle="--",
            label="copying 8 times the input",
        )
        panel.set_xticks(range(len(shapes)), shapes)
        panel.set_ylabel("speed / a copy's speed\n(higher is faster)")
        panel.set_title(f"BN and ReLU, forward and backward, {dtype}")
        panel.set_axisbelow(True)
        panel.grid(axis="y", alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize="small")
    return figure


def draw_network(content: dict[str, Any]) -> Figure:
    """Time of a training step, and its memory, a panel a network."""
    rows = select(content["rows"], mode="training")
    groups = list(dict.fromkeys((row["network"], row["dtype"]) for row in rows))
    figure = Figure(figsize=(5 * len(groups), 3.2), layout="constrained")
    panels = figure.subplots(1, len(groups), squeeze=False, sharey=True)[0]
    for panel, (network, dtype) in zip(panels, groups, strict=True):
        own = select(rows, network=network, dtype=dtype)
        for place, row in enumerate(own):
            spread = [[row["median"] - row["low"]], [row["high"] - row["median"]]]
            panel.barh(place, row["median"], xerr=spread, **style_of(row["name"]).bar)
            text = f"{row['median']:.0f} ms, {row['temporary_megabytes']:.0f} MB"
            _write(panel, row["high"], place, text)
        panel.set_yticks(range(len(own)), [row["name"] for row in own])
        panel.set_xlim(0, 1.45 * max(row["high"] for row in own))
        panel.set_title(f"{network}, {dtype}: a training step")
        panel.set_xlabel("ms (and memory beside arguments and results)")
    panels[0].invert_yaxis()
    return figure


def draw_mnist(content: dict[str, Any]) -> Figure:
    """Seconds for the whole training."""
    rows = content["rows"]
    figure = Figure(figsize=(6.5, 0.9 + 0.5 * len(rows)), layout="constrained")
    panel = figure.subplots()
    for place, row in enumerate(rows):
        seconds = row["seconds_50000_steps"]
        panel.barh(place, seconds, **style_of(row["name"]).bar)
        _write(panel, seconds, place, f"{seconds:.1f} s")
    panel.set_yticks(range(len(rows)), [row["name"] for row in rows])
    panel.set_xlim(0, 1.15 * max(row["seconds_50000_steps"] for row in rows))
    panel.invert_yaxis()
    panel.set_title("MNIST with batch normalisation, 50,000 steps")
    panel.set_xlabel("seconds")
    return figure


def draw_activations(content: dict[str, Any]) -> Figure:
    """How much longer an activation takes after the transform than in it."""
    figure = Figure(figsize=(6.5, 3.4), layout="constrained")
    panel = figure.subplots()
    names = list(dict.fromkeys(row["activation"] for row in content["rows"]))
    dtypes = list(dict.fromkeys(row["dtype"] for row in content["rows"]))
    for number, dtype in enumerate(dtypes):
        own = select(content["rows"], dtype=dtype)
        places = np.arange(len(names)) + 0.4 * number - 0.2
        values = [row["apart / fused"] for row in own]
        bars = panel.bar(places, values, 0.38, label=dtype, **style_of(dtype).bar)
        panel.bar_label(bars, [f"{value:.2f}" for value in values], fontsize="small")
    panel.axhline(1, color=BLACK, linewidth=0.8, linestyle="--")
    panel.set_xticks(range(len(names)), names)
    panel.set_title("An activation after the transform, beside the same one in it")
    panel.set_ylabel("time after / time in it")
    panel.margins(y=0.1)
    panel.legend(loc="upper left")
    return figure


def draw_input(content: dict[str, Any]) -> Figure:
    """Images a second against workers."""
    figure = Figure(figsize=(6.5, 3.6), layout="constrained")
    panel = figure.subplots()
    for name in dict.fromkeys(row["name"] for row in content["rows"]):
        own = select(content["rows"], name=name)
        workers = [row["workers"] for row in own]
        images = [row["images_per_second"] for row in own]
        panel.plot(workers, images, label=name, **style_of(name).line)
    panel.set_xticks(sorted({row["workers"] for row in content["rows"]}))
    panel.set_title("Crops of 224 x 224 from JPEGs")
    panel.set_xlabel("worker processes (tf.data: threads)")
    panel.set_ylabel("images a second")
    panel.set_ylim(bottom=0)
    panel.grid(alpha=0.3)
    panel.legend(loc="lower right")
    return figure


def draw_scaling(content: dict[str, Any]) -> Figure:
    """Against batch, channels, devices and width."""
    figure = Figure(figsize=(15, 3.9), layout="constrained")
    panels = figure.subplots(1, 4)
    kinds: list[tuple[str, str, str, str, float]] = [
        ("batch", "median", "Time over the batch\n(batch, 14, 14, 256)", "ms", 1),
        ("channels", "median", "Time over channels\n(32, 14, 14, channels)", "ms", 1),
        ("devices", "bytes", "Collectives of a step\n256 channels", "KB", 1e-3),
    ]
    for panel, (varied, key, title, unit, factor) in zip(panels, kinds, strict=False):
        for name in ("bn_jax", "flax.linen"):
            rows = select(content[varied], name=name)
            places = [row[varied] for row in rows]
            values = [factor * row[key] for row in rows]
            panel.plot(places, values, label=name, **style_of(name).line)
        panel.set_title(title, fontsize="medium")
        panel.set_xlabel(varied)
        panel.set_ylabel(unit)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        panel.set_xticks(places, [f"{place:,}" for place in places], rotation=45)
        panel.yaxis.set_major_formatter("{x:g}")
        panel.grid(alpha=0.3)
        panel.legend()
    rows = content["checkpoint"]
    places = [row["width"] for row in rows]
    for name in ("state", "checkpoint"):
        values = [row[f"{name}_megabytes"] for row in rows]
        panels[3].plot(places, values, label=name, **style_of(name).line)
    panels[3].set_title(
        "Inception's training state\nin memory and on disk", fontsize="medium"
    )
    panels[3].set_xlabel("width")
    panels[3].set_xticks(places, [f"{place:g}" for place in places], rotation=45)
    panels[3].set_ylabel("MB")
    panels[3].grid(alpha=0.3)
    panels[3].legend()
    return figure


def _write(panel: Any, x: float, y: float, text: str) -> None:
    """Text to the right of a bar's end."""
    panel.annotate(
        text, (x, y), (5, 0), textcoords="offset points", va="center", fontsize="small"
    )
