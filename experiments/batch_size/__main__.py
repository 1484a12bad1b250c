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

from experiments.running import commands


def main(config: dict[str, Any], workdir: Path, data_dir: str | None) -> None:
    """Runs the experiment that the configuration describes."""
    # Imported here so that --help and wrong flags are answered at once.
    from experiments.batch_size.training import run

    run(config, workdir, data_dir)


if __name__ == "__main__":
    commands.launch(
        main, "experiments.batch_size.config", __doc__, workdir="runs/batch_size"
    )
