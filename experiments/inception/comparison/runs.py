"""Reads what training runs left in their folders, and tells models from seeds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.configuration.fields import Role
from experiments.inception.config import CONFIGURATION
from experiments.running.metrics import read_rows
from experiments.running.workdir import WorkdirError, read_json

CONFIG_FILE, METRICS_FILE, SUMMARY_FILE = "config.json", "metrics.jsonl", "summary.json"
CONFIG_KEYS = (
    *("variant", "seed", "num_steps", "learning_rate", "rate_multiple", "batch_size"),
    *("dataset", "image_size", "crop_fraction", "eval_examples"),
)
SUMMARY_KEYS = ("diverged_at", "final")
# In what runs of one model may differ: the seed, and what leaves its numbers alone.
SEED_KEYS = ("data_checksum", *CONFIGURATION.keys(Role.SEED, Role.LAUNCH))


class Run(NamedTuple):
    """One training run."""

    folder: Path
    config: dict[str, Any]
    steps: np.ndarray  # int (evaluations,), increasing
    top1: np.ndarray  # float (evaluations,), percent
    summary: dict[str, Any] | None  # None as long as the run is not finished

    @property
    def diverged_at(self) -> int | None:
        """The first step whose loss was not finite, of a run that ended there."""
        return self.summary["diverged_at"] if self.summary else None

    @property
    def initial_rate(self) -> float:
        """The learning rate of the first step."""
        rate = self.config["learning_rate"] * self.config["rate_multiple"]
        return float(f"{rate:.12g}")  # 0.1 * 3 is not 0.3 to the last bit


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Reads runs, each once, in the order of their folders' names.

    Args:
      folders: each that of a run, or one that contains runs one level below. Of the
        latter, runs without any evaluation yet are left out, and named on the output.

    Raises:
      WorkdirError: there is no run, a folder holds none, or a file is damaged.
    """
    found: dict[Path, Path] = {}
    for folder in folders:
        for run in _expand(folder):
            found.setdefault(run.resolve(), run)
    if not found:
        raise WorkdirError(
            "no run to compare: give the workdirs of runs of experiments.inception "
            "that have been evaluated at least once, or folders that contain some."
        )
    return [read_run(found[path]) for path in sorted(found)]


def read_run(folder: Path) -> Run:
    """Reads the folder of one run.

    Raises:
      WorkdirError: a file is missing or damaged, or lacks what a comparison needs.
    """
    for name in (CONFIG_FILE, METRICS_FILE):
        if not (folder / name).is_file():
            raise WorkdirError(
                f"{folder} lacks {name}: expected the workdir of a run of "
                "experiments.inception, or a folder that contains some."
            )
    config = read_json(folder / CONFIG_FILE, CONFIG_KEYS)
    path = folder / SUMMARY_FILE
    summary = read_json(path, SUMMARY_KEYS) if path.is_file() else None
    rows = read_rows(folder / METRICS_FILE)
    if not rows:
        raise WorkdirError(
            f"{folder} holds no evaluation yet: expected rows in {METRICS_FILE}; "
            "compare it when its run has got further."
        )
    try:
        steps = np.array([int(row["step"]) for row in rows])
        top1 = np.array([float(row["top1"]) for row in rows])
    except (KeyError, TypeError, ValueError):
        raise WorkdirError(
            f"{folder / METRICS_FILE} has a row without step or top1: expected both as "
            "numbers in every row; give the workdir of a run of experiments.inception."
        ) from None
    return Run(folder, config, steps, top1, summary)


def group_runs(
    runs: Sequence[Run], but: Sequence[str] = SEED_KEYS
) -> dict[str, list[Run]]:
    """The runs of each model, by its name.

    Args:
      runs: of any number of models.
      but: the configuration keys in which runs of one model may differ.

    Returns:
      Names are variants; where several models are of one variant, with the
      configuration keys and values in which these differ.
    """
    groups: list[tuple[dict[str, Any], list[Run]]] = []
    for run in runs:
        own = {key: value for key, value in run.config.items() if key not in but}
        for config, members in groups:
            if config == own:
                members.append(run)
                break
        else:
            groups.append((own, [run]))
    return {
        _name(config, [other for other, _ in groups]): members
        for config, members in groups
    }


def _name(config: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> str:
    """The variant, and the keys in which configurations of this variant differ."""
    absent = "absent"
    variant = config["variant"]
    siblings = [other for other in others if other["variant"] == variant]
    differing = [
        f"{key}={config.get(key, absent)}"
        for key in sorted(set().union(*siblings))
        if any(config.get(key, absent) != other.get(key, absent) for other in siblings)
    ]
    return f"{variant} ({', '.join(differing)})" if differing else variant


def _expand(folder: Path) -> list[Path]:
    """The folders of runs that one folder stands for."""
    if (folder / CONFIG_FILE).is_file():
        return [folder]
    below = sorted(path.parent for path in folder.glob(f"*/{CONFIG_FILE}"))
    if not below:
        raise WorkdirError(
            f"{folder} holds no run: expected {CONFIG_FILE} and {METRICS_FILE}, there "
            "or in folders one level below; give the --workdir of finished or running "
            "experiments."
        )
    started = [run for run in below if read_rows(run / METRICS_FILE)]
    for run in sorted(set(below) - set(started)):
        print(f"{run} holds no evaluation yet: left out.")
    return started
