"""Figures as files."""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from experiments.running.new_files import whole_file


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG and as SVG, beside each other."""
    # Nothing in the files may depend on the time: the same run, the same files.
    with matplotlib.rc_context({"svg.hashsalt": "bn_jax"}):
        with whole_file(path.with_suffix(".png")) as file:
            figure.savefig(file, format="png", dpi=150)
        with whole_file(path.with_suffix(".svg")) as file:
            figure.savefig(file, format="svg", metadata={"Date": None})
