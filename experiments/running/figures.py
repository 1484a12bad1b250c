"""Figures as files."""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG and as SVG, beside each other, each of them whole."""
    # Nothing in the files may depend on the time: the same run, the same files.
    options = {"png": {"dpi": 150}, "svg": {"metadata": {"Date": None}}}
    with matplotlib.rc_context({"svg.hashsalt": "bn_jax"}):
        for form, chosen in options.items():
            partial = path.with_suffix(f".{form}.partial")
            figure.savefig(partial, format=form, **chosen)
            partial.replace(path.with_suffix(f".{form}"))
