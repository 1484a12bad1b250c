"""Trains the variants of section 4.2, or the runs of an ablation, and compares them.

    python -m experiments.inception_sweep [--sweep=NAME] [--workdir=DIR]
    python -m experiments.inception_sweep --sweep=rates [--config.KEY=VALUE ...]

Sweeps are listed in experiments/inception/sweeps/table.py. Every run is a command of
its own, `python -m experiments.inception`, with its folder in the workdir and its
output beside it; --config.KEY=VALUE is handed on to all of them. On CPU as many run
side by side as there are cores, since a step gains little from a second one; on an
accelerator one after another, since there they hold each other up.

A sweep that was stopped goes on where it was when started again. At the end
experiments.compare draws its figures and tables.
"""

from pathlib import Path

from absl import flags

from experiments.inception.config import SIZES
from experiments.inception.sweeps.table import SWEEPS
from experiments.running import commands

_SWEEP = flags.DEFINE_enum("sweep", "variants", list(SWEEPS), "What is swept.")
_SIZE = flags.DEFINE_enum("size", "small", list(SIZES), "How large the runs are.")
_SEEDS = flags.DEFINE_integer("seeds", 1, "Runs of each kind.", lower_bound=1)
_JOBS = flags.DEFINE_integer(
    "jobs", None, "Runs side by side (default: see above).", lower_bound=1
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder for the runs (default: runs/SWEEP)."
)
_DATA = flags.DEFINE_string(
    "data_dir", None, "Folder of prepared sets, for sizes of natural images."
)


def main(arguments: list[str]) -> None:
    """Runs the sweep that the flags describe."""
    # Imported here so that --help and wrong flags are answered at once.
    from experiments.inception.sweeps.running import run_sweep

    workdir = Path(_WORKDIR.value or f"runs/{_SWEEP.value}")
    run_sweep(
        SWEEPS[_SWEEP.value],
        _SIZE.value,
        _SEEDS.value,
        _JOBS.value,
        workdir,
        arguments,
        _DATA.value,
    )


if __name__ == "__main__":
    commands.launch_with_arguments(main, __doc__, hands_on=True)
