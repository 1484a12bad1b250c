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

from experiments.running import commands

_DESCRIBE = flags.DEFINE_bool(
    "describe", False, "Print the network's layers and exit; needs no data."
)

WITHOUT_DATA = (
    "images that need no data: python -m experiments.inception --config=bn_x5,small"
)


def main(config: dict[str, Any], workdir: Path, data_dir: str | None) -> None:
    """Runs the experiment that the configuration and the flag describe."""
    # Imported here so that --help and wrong flags are answered at once.
    from experiments.data.errors import DataError
    from experiments.inception import training

    if _DESCRIBE.value:
        print(training.describe_network(config, data_dir))
        return
    try:
        training.run(config, workdir, data_dir)
    except DataError as error:
        if "is not prepared" not in str(error):
            raise
        raise DataError(f"{error}; {WITHOUT_DATA}") from None


if __name__ == "__main__":
    commands.launch(
        main, "experiments.inception.config", __doc__, workdir="runs/{variant}"
    )
