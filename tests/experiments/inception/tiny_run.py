"""Runs `experiments.inception` with the tiny network and data of `tiny_inception`.

python -m tests.experiments.inception.tiny_run [ARGUMENTS ...]
"""

from pathlib import Path
from typing import Any

from experiments.running import commands
from tests.experiments.inception.tiny_inception import TINY, run_tiny


def tiny_arguments(
    workdir: object, variant: str = "bn_x5", **changes: object
) -> list[str]:
    """The command line of a tiny run."""
    changed = TINY | changes
    return [
        f"--config={variant},small",
        *(f"--config.{key}={value}" for key, value in changed.items()),
        f"--workdir={workdir}",
    ]


def main(config: dict[str, Any], workdir: Path, data_dir: str | None) -> None:
    run_tiny(config, workdir)


if __name__ == "__main__":
    commands.launch(
        main, "experiments.inception.config", __doc__, workdir="runs/{variant}"
    )
