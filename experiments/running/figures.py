"""Figures as files."""

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from experiments.running.new_files import whole_file


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
