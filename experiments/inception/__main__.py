"""Trains one variant of section 4.2's Inception network.

    python -m experiments.inception --config=bn_x5,small
    python -m experiments.inception --config=bn_x5 --data_dir=... [...]
    python -m experiments.inception --describe

The first needs nothing more: its images are composed of the bundled MNIST. The second
trains on ImageNet, or another image classification set that tensorflow-datasets has
prepared in --data_dir. The third prints the network's layers. The workdir receives
summary.json, metrics.jsonl, TensorBoard events, the configuration and checkpoints;
experiments.compare and experiments.evaluate read it.

A run that was stopped, in whatever way, goes on from its last checkpoint when started
again with the same workdir, and ends with the same numbers.
"""

from pathlib import Path
from typing import Any

from absl import flags

from experiments.inception import config as default_config
from experiments.running import commands

_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Folder for the results; a stopped run goes on there. (default: runs/VARIANT)",
)
_DATA_DIR = flags.DEFINE_string(
    "data_dir",
    None,
    "Folder of prepared tensorflow-datasets (default: their own, "
    "~/tensorflow_datasets).",
)
_DESCRIBE = flags.DEFINE_bool(
    "describe", False, "Print the network's layers and exit; needs no data."
)


def main(config: dict[str, Any]) -> None:
    """Runs the experiment that the configuration and the flags describe."""
    # Imported here so that --help and wrong flags are answered at once.
    from experiments.inception import training

    if _DESCRIBE.value:
        print(training.describe_network(config, _DATA_DIR.value))
        return
    workdir = Path(_WORKDIR.value or f"runs/{config['variant']}")
    training.run(config, workdir, _DATA_DIR.value)


if __name__ == "__main__":
    commands.launch(main, default_config, __doc__)
