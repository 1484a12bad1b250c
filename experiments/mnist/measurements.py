"""What an MNIST run measures, and when."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.mnist.experiment import Experiment, States
from experiments.running.record import Measured

LOGS = ("metrics", "percentiles")  # that `measure` makes rows for


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


def measure(
    experiment: Experiment, step: int, states: States, losses: Mapping[str, np.ndarray]
) -> Measured:
    """Evaluates every network.

    Args:
      experiment: what is measured.
      step: steps done.
      states: a state a network.
      losses: mean training losses (replicas,), where there were steps.

    Returns:
      A row a network with accuracy in percent, loss and, at milestones, accuracy with
      population statistics, (replicas,) each; and one with the percentiles of the
      sigmoids' inputs, (replicas, percentiles, units).
    """
    accuracy = experiment.accuracy(states)
    population = {}
    if step in milestone_steps(experiment.config):
        population = experiment.population_accuracy(states, step)
    measured = {
        "accuracy": accuracy,
        "loss": losses,
        "population_accuracy": population,
    }
    rows, scalars = rows_and_scalars(
        step, states, measured, range(len(experiment.replicas.seed))
    )
    percentiles = []
    if experiment.config["probe_examples"]:
        for name, inputs in experiment.sigmoid_percentiles(states).items():
            rounded = np.round(inputs.astype(float), 4).tolist()
            percentiles.append({"step": step, "network": name, "values": rounded})
    return Measured(
        rows=dict(zip(LOGS, (rows, percentiles), strict=True)),
        scalars=scalars,
        shown={name: f"{value.mean():.2f}%" for name, value in accuracy.items()},
    )


def rows_and_scalars(
    step: int,
    names: Iterable[str],
    measured: Mapping[str, Mapping[str, np.ndarray]],
    replicas: Sequence[Any] | np.ndarray,
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """A row a network for a log, and every number by a tag for TensorBoard.

    Args:
      step: steps done.
      names: of the networks.
      measured: by what it is, for each network (replicas,).
      replicas: what tags call them.
    """
    rows, scalars = [], {}
    for name in names:
        values = {key: of[name] for key, of in measured.items() if name in of}
        lists = {key: array.tolist() for key, array in values.items()}
        rows.append({"step": step, "network": name, **lists})
        for key, array in values.items():
            for number, value in zip(replicas, array, strict=True):
                scalars[f"{key}/{name}/{number}"] = value
    return rows, scalars
