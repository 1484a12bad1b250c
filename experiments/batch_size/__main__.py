"""Draws accuracy against batch size, for shuffled and for skewed batches.

    python -m experiments.batch_size [--workdir=DIR] [--config.KEY=VALUE ...]

One small convolutional network is trained with batch normalisation, ghost batches,
batch renormalisation, and layer, group and instance normalisation, at every batch size,
on as many examples each. The workdir receives batch_size.png and .svg, batch_size.md
with the table, results.jsonl with every run, and summary.json.

What has been trained is not trained again: a run that was stopped goes on when started
again with the same workdir.
"""

from pathlib import Path
from typing import Any

from absl import flags

from experiments.batch_size import config as default_config
from experiments.running import commands

_WORKDIR = flags.DEFINE_string(
    "workdir", "runs/batch_size", "Folder for the results; a stopped run goes on there."
)
_DATA_DIR = flags.DEFINE_string(
    "data_dir",
    None,
    "Folder of prepared tensorflow-datasets; without it, mnist is the bundled one.",
)


def main(config: dict[str, Any]) -> None:
    """Runs the experiment that the configuration and the flags describe."""
    # Imported here so that --help and wrong flags are answered at once.
    from experiments.batch_size.training import run

    run(config, Path(_WORKDIR.value), _DATA_DIR.value)


if __name__ == "__main__":
    commands.launch(main, default_config, __doc__)
