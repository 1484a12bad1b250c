"""Figures as files."""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

# Okabe and Ito's colours, which the colour-blind can tell apart, but for the yellow.
# Line styles, markers and hatches go with them, where colours alone do not help.
BLACK, BLUE, VERMILION, GREEN = "#000000", "#0072B2", "#D55E00", "#009E73"
PURPLE, ORANGE, SKY, GREY = "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F"


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG and as SVG, beside each other."""
    # Nothing in the files may depend on the time: the same run, the same files.
    with matplotlib.rc_context({"svg.hashsalt": "bn_jax"}):
        figure.savefig(path.with_suffix(".png"), dpi=150)
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
