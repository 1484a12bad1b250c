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

from absl import flags

from experiments.mnist import config as default_config
from experiments.running import commands

_WORKDIR = flags.DEFINE_string(
    "workdir", "runs/mnist", "Folder for the results; a stopped run goes on there."
)
_DATA_DIR = flags.DEFINE_string(
    "data_dir",
    None,
    "Folder of prepared tensorflow-datasets; without it, mnist is the bundled one.",
)


def main(config: dict[str, Any]) -> None:
    """Runs the experiment that the configuration and the flags describe."""
    # Imported here so that --help and wrong flags are answered at once.
    from experiments.mnist.training import run

    run(config, Path(_WORKDIR.value), _DATA_DIR.value)


if __name__ == "__main__":
    commands.launch(main, default_config, __doc__)
