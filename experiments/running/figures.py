"""Figures as files."""

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from experiments.running.new_files import whole_file

# Okabe and Ito's colours, which the colour-blind can tell apart, but for the yellow.
# Line styles, markers and hatches go with them, where colours alone do not help.
BLACK, BLUE, VERMILION, GREEN = "#000000", "#0072B2", "#D55E00", "#009E73"
PURPLE, ORANGE, SKY, GREY = "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F"


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG and as SVG, beside each other, each of them whole."""
    # Nothing in the files may depend on the time: the same run, the same files.
    options: dict[str, dict[str, Any]] = {
        "png": {"dpi": 150},
        "svg": {"metadata": {"Date": None}},
    }
    with matplotlib.rc_context({"svg.hashsalt": "bn_jax"}):
        for form, chosen in options.items():
            with whole_file(path.with_suffix(f".{form}")) as file:
                figure.savefig(file, format=form, **chosen)
