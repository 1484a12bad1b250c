"""Trains the network of section 4.1 with and without batch normalisation.

    python -m experiments.mnist [--workdir=runs/mnist] [--config.KEY=VALUE ...]
    python -m experiments.mnist --config=rates

Both networks, several seeds each, train side by side on the bundled MNIST or on any
image classification set that tensorflow-datasets has prepared in --data_dir. The
workdir receives figure 1 of the paper (figure1.png and .svg), or accuracy against rate
(rates.png and .svg) when several learning rates are given; summary.json, metrics.jsonl,
percentiles.jsonl, TensorBoard events, the configuration, and checkpoints.

A run that was stopped, in whatever way, goes on from its last checkpoint when started
again with the same workdir, and ends with the same numbers.
"""

from pathlib import Path
from typing import Any

from experiments.running import commands


def main(config: dict[str, Any], workdir: Path, data_dir: str | None) -> None:
    """Runs the experiment that the configuration describes."""
    # Imported here so that --help and wrong flags are answered at once.
    from experiments.mnist.training import run

    run(config, workdir, data_dir)


if __name__ == "__main__":
    commands.launch(main, "experiments.mnist.config", __doc__, workdir="runs/mnist")
