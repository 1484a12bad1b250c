"""Figures as files."""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG and as SVG, beside each other."""
    # Nothing in the files may depend on the time: the same run, the same files.
    with matplotlib.rc_context({"svg.hashsalt": "bn_jax"}):
        figure.savefig(path.with_suffix(".png"), dpi=150)
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
