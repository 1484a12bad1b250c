"""What an MNIST run measures, and when: rows on disk and TensorBoard curves."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import SummaryWriter

from experiments.distributed.processes import is_first
from experiments.mnist_experiment.networks import Experiment, States
from experiments.running.metrics import MetricsLog


def evaluation_steps(config: Mapping[str, Any]) -> set[int]:
    """The steps after which accuracy is measured: 0, the last, and those between."""
    last = config["num_steps"]
    early = min(config["early_steps"], last)
    steps = {0, last} | set(milestone_steps(config))
    steps |= set(range(0, early + 1, config["early_eval_every"]))
    return steps | set(range(0, last + 1, config["eval_every"]))


def milestone_steps(config: Mapping[str, Any]) -> list[int]:
    """The steps that the summary reports: those asked for, as far as the run goes."""
    last = config["num_steps"]
    return sorted({step for step in config["milestones"] if step < last} | {last})


class Measurements:
    """The files `metrics.jsonl` and `percentiles.jsonl`, and TensorBoard events."""

    def __init__(
        self, experiment: Experiment, workdir: Path, resumed_at: int | None
    ) -> None:
        """Opens the files, and takes those of a resumed run back to its checkpoint.

        Args:
          experiment: what is measured.
          workdir: the folder of the files.
          resumed_at: the checkpoint's step, or None for a run that starts.

        Raises:
          WorkdirError: rows up to the checkpoint are missing.
        """
        self._experiment = experiment
        config = experiment.config
        kept: list[int] = []
        if resumed_at is not None:
            done = [step for step in evaluation_steps(config) if step <= resumed_at]
            kept = [step for step in sorted(done) for _ in experiment.models]
        probed = kept if config["probe_examples"] else []
        purge_step = 0 if resumed_at is None else resumed_at + 1
        with contextlib.ExitStack() as opened:
            self._metrics = MetricsLog(workdir / "metrics.jsonl", kept, is_first())
            opened.callback(self._metrics.close)
            self._percentiles = MetricsLog(
                workdir / "percentiles.jsonl", probed, is_first()
            )
            opened.callback(self._percentiles.close)
            self._events = SummaryWriter(
                str(workdir / "tensorboard"),
                purge_step=purge_step,
                write_to_disk=is_first(),
            )
            opened.callback(self._events.close)
            self._opened = opened.pop_all()

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A row an evaluation and network: step, accuracy and loss of each replica."""
        return self._metrics.rows

    @property
    def percentiles(self) -> list[dict[str, Any]]:
        """A row an evaluation and network: (replicas, percentiles, units)."""
        return self._percentiles.rows

    def measure(
        self, step: int, states: States, losses: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Evaluates and records every network.

        Args:
          step: steps done.
          states: a state a network.
          losses: mean training losses (replicas,), where there were steps.

        Returns:
          Accuracy in percent, (replicas,) a network.
        """
        experiment = self._experiment
        accuracy = experiment.accuracy(states)
        population = {}
        if step in milestone_steps(experiment.config):
            population = experiment.population_accuracy(states, step)
        measured = {
            "accuracy": accuracy,
            "loss": losses,
            "population_accuracy": population,
        }
        for name in states:
            values = {key: of[name] for key, of in measured.items() if name in of}
            lists = {key: array.tolist() for key, array in values.items()}
            self._metrics.write({"step": step, "network": name, **lists})
            for key, array in values.items():
                for replica, value in enumerate(array):
                    self._events.add_scalar(f"{key}/{name}/{replica}", value, step)
        if experiment.config["probe_examples"]:
            for name, inputs in experiment.sigmoid_percentiles(states).items():
                rounded = np.round(inputs.astype(float), 4).tolist()
                row = {"step": step, "network": name, "values": rounded}
                self._percentiles.write(row)
        return accuracy

    def flush(self) -> None:
        """Puts everything that was measured on disk."""
        for log in (self._metrics, self._percentiles, self._events):
            log.flush()

    def close(self) -> None:
        """Puts everything on disk and closes the files."""
        self._opened.close()
