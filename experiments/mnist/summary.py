"""What an MNIST run showed, from its rows: numbers for `summary.json` and a table."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.running import provenance
from experiments.running.tables import spread, table
from experiments.training.evaluation import PERCENTILES

ACCURACY_LEVELS = (90, 95, 97)  # percent

Row = Mapping[str, Any]


def summarise(
    config: Mapping[str, Any],
    replicas: Mapping[str, np.ndarray],
    rows: Sequence[Row],
    percentiles: Sequence[Row],
) -> dict[str, Any]:
    """The summary of a finished run, as JSON values.

    Args:
      config: the run's configuration.
      replicas: `seed`, `learning_rate` and `initial_std`, (replicas,) each.
      rows: of metrics.jsonl.
      percentiles: of percentiles.jsonl; empty if they were not measured.

    Returns:
      For each network a list of settings (a learning rate and an initial standard
      deviation each), with accuracy at the milestones by moving-average and by
      population (Algorithm 2) statistics, steps to reach some levels, and how far the
      percentiles of the sigmoids' inputs travelled.
    """
    return {
        **provenance.describe(),
        "config": dict(config),
        "networks": {
            name: _summarise_network(
                replicas,
                [row for row in rows if row["network"] == name],
                [row for row in percentiles if row["network"] == name],
            )
            for name in dict.fromkeys(row["network"] for row in rows)
        },
    }


def settings(summary: Mapping[str, Any]) -> list[tuple[float, float]]:
    """The pairs of learning rate and initial standard deviation that were run."""
    first = next(iter(summary["networks"].values()))
    return [(entry["learning_rate"], entry["initial_std"]) for entry in first]


def typical_unit(tracks: np.ndarray) -> int:
    """The unit whose percentiles travel as far as those of the median unit.

    Args:
      tracks: (evaluations, percentiles, units).
    """
    distance = _travel(tracks).mean(axis=0)
    return int(np.argsort(distance)[len(distance) // 2])


def as_table(summary: Mapping[str, Any]) -> str:
    """The main numbers of a summary as text for a terminal."""
    first = next(iter(summary["networks"].values()))[0]
    steps = list(first["accuracy"])
    header = ["network", "rate", "std"]
    header += [f"% at {step}" for step in steps] + ["% (Alg. 2)"]
    header += [f"steps to {level}%" for level in ACCURACY_LEVELS]
    probed = "sigmoid_input" in first
    header += ["range of the median"] * probed
    rows = []
    for name, entries in summary["networks"].items():
        for entry in entries:
            accuracy = entry["accuracy"]
            row = [name, f"{entry['learning_rate']:g}", f"{entry['initial_std']:g}"]
            row += [spread(accuracy[step]["moving_average"]) for step in steps]
            row += [spread(accuracy[steps[-1]]["population"])]
            row += [
                "never" if mean is None else f"{mean:.0f}"
                for mean in (level["mean"] for level in entry["steps_to"].values())
            ]
            if probed:
                row.append(spread(entry["sigmoid_input"]["travel"]["50"]))
            rows.append(row)
    return table(header, rows, markdown=False)


def _summarise_network(
    replicas: Mapping[str, np.ndarray], rows: list[Row], percentiles: list[Row]
) -> list[dict[str, Any]]:
    pairs = list(zip(replicas["learning_rate"], replicas["initial_std"], strict=True))
    entries = []
    for rate, std in dict.fromkeys(pairs):
        members = [i for i, pair in enumerate(pairs) if pair == (rate, std)]
        entry = {
            "learning_rate": float(rate),
            "initial_std": float(std),
            "seeds": [int(replicas["seed"][i]) for i in members],
            "accuracy": {
                str(row["step"]): {
                    "moving_average": _statistics(row["accuracy"], members),
                    "population": _statistics(row["population_accuracy"], members),
                }
                for row in rows
                if "population_accuracy" in row
            },
            "steps_to": {
                str(level): _statistics(_steps_to(rows, level), members)
                for level in ACCURACY_LEVELS
            },
        }
        if percentiles:
            entry["sigmoid_input"] = _summarise_percentiles(percentiles, members)
        entries.append(entry)
    return entries


def _statistics(values: Sequence[float | None], members: list[int]) -> dict[str, Any]:
    """Mean and sample standard deviation over seeds; None where a seed has no value."""
    chosen = [values[i] for i in members]
    known = [value for value in chosen if value is not None]
    complete = len(known) == len(chosen)
    return {
        "mean": float(np.mean(known)) if complete else None,
        "std": float(np.std(known, ddof=1)) if complete and len(known) > 1 else None,
        "values": chosen,
    }


def _steps_to(rows: list[Row], level: float) -> list[int | None]:
    """For each replica the first evaluation that reached a level of accuracy."""
    reached: list[int | None] = [None] * len(rows[0]["accuracy"])
    for row in reversed(rows):
        for replica, accuracy in enumerate(row["accuracy"]):
            if accuracy >= level:
                reached[replica] = row["step"]
    return reached


def _summarise_percentiles(rows: list[Row], members: list[int]) -> dict[str, Any]:
    """Percentiles of the last hidden layer's sigmoid inputs, averaged over its units.

    Travel is the distance between the lowest and the highest value that a percentile
    takes over training, averaged over units.
    """
    values = np.array([row["values"] for row in rows], float)
    # (evaluations, replicas, percentiles, units) -> one array a seed
    tracks = [values[:, replica] for replica in members]
    return {
        "steps": [row["step"] for row in rows],
        "mean_percentiles": np.mean(tracks, axis=(0, 3)).round(4).tolist(),
        "travel": {
            str(percentile): _statistics(
                [float(_travel(track)[row].mean()) for track in tracks],
                list(range(len(tracks))),
            )
            for row, percentile in enumerate(PERCENTILES)
        },
        "typical_unit": typical_unit(tracks[0]),
    }


def _travel(tracks: np.ndarray) -> np.ndarray:
    """(evaluations, percentiles, units) -> travel (percentiles, units)."""
    travel: np.ndarray = np.ptp(tracks, axis=0)
    return travel
