"""Trains LSTMs on images as sequences, with and without batch normalisation.

    python -m experiments.sequential_mnist [--workdir=DIR] [--config.KEY=VALUE]
    python -m experiments.sequential_mnist --config=pixels

Two networks read the pixels in order, two in one random order, side by side and with
several seeds each. The workdir receives accuracy over training steps beside the paper's
(accuracy.png and .svg), results.md, summary.json, metrics.jsonl, TensorBoard events,
the configuration, and checkpoints.

A run that was stopped, in whatever way, goes on from its last checkpoint when started
again with the same workdir, and ends with the same numbers.
"""

from pathlib import Path
from typing import Any

from experiments.running import commands


def main(config: dict[str, Any], workdir: Path, data_dir: str | None) -> None:
    """Runs the experiment that the configuration describes."""
    # Imported here so that --help and wrong flags are answered at once.
    from experiments.sequential_mnist.training import run

    run(config, workdir, data_dir)


if __name__ == "__main__":
    commands.launch(
        main,
        "experiments.sequential_mnist.config",
        __doc__,
        workdir="runs/sequential_mnist",
    )
