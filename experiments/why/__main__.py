"""Measures why batch normalisation helps, with and without it.

    python -m experiments.why [--workdir=runs/why] [--config.KEY=VALUE ...]
    python -m experiments.why --config.parts=depth,dropout

Parts: the loss and its gradient along the gradient (landscape), internal covariate
shift (shift), the singular values of layers' Jacobians (jacobians), normalisation
outside the gradient (outside), which depths train (depth), batch normalisation before
or after the nonlinearity (order), and dropout with it (dropout). The workdir receives
a figure for each, PART.png and .svg, why.md with the tables, results.jsonl and
summary.json.

What has been measured is not measured again: a run that was stopped goes on when
started again with the same workdir, and other parts may be added there.
"""

from pathlib import Path
from typing import Any

from experiments.running import commands


def main(config: dict[str, Any], workdir: Path, data_dir: str | None) -> None:
    """Runs the parts that the configuration names."""
    # Imported here so that --help and wrong flags are answered at once.
    from experiments.why.experiment import run

    run(config, workdir, data_dir)


if __name__ == "__main__":
    commands.launch(main, "experiments.why.config", __doc__, workdir="runs/why")
