"""Compares runs: figure 3's numbers, and accuracy against the learning rate."""

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.configuration.fields import ConfigError
from experiments.inception.comparison.runs import SEED_KEYS, Run, group_runs

BASELINE = "inception"  # the variant that the others are compared with
BASELINE_HE = "inception_he"  # the same with other initial weights
PAPER_BATCH = 32  # examples a step
RATE_KEYS = ("learning_rate", "rate_multiple")
# What accuracy is measured on.
TEST_SET_KEYS = ("dataset", "data", "image_size", "crop_fraction", "eval_examples")
STATISTICS = ("moving_average", "population", "test_batch")  # of the final evaluations
FINISHED = "finished"  # the state of runs that learnt and ended as planned
# Percent. Means of the same counts may differ in their last bits.
TOLERANCE = 1e-9


class PaperRow(NamedTuple):
    """A row of the paper's figure 3, or of its text."""

    initial_rate: float | None
    steps: int | None  # to 72.2%
    outcome: str  # why there are no steps
    best: float | None  # percent


PAPER = {
    "inception": PaperRow(0.0015, 31_000_000, "", 72.2),
    "bn_baseline": PaperRow(0.0015, 13_300_000, "", 72.7),
    "bn_x5": PaperRow(0.0075, 2_100_000, "", 73.0),
    "bn_x30": PaperRow(0.045, 2_700_000, "", 74.8),
    "bn_x5_sigmoid": PaperRow(0.0075, None, "never", 69.8),
    "inception_x5": PaperRow(0.0075, None, "reached machine infinity", None),
    "inception_sigmoid": PaperRow(None, None, "stayed at chance", None),
}


def compare(runs: Sequence[Run], references: Sequence[str] = ()) -> dict[str, Any]:
    """Compares models with the best accuracy of some of them, the references.

    Runs that differ in their seed alone are one model, whose curve is their mean over
    the steps at which all of them were evaluated.

    Args:
      runs: of any number of models.
      references: names of models. By default the variant "inception" at the paper's
        rate, and the best of it and `inception_he`, at whatever rates there are; the
        others of these are then named in `baselines_tried` alone.

    Returns:
      JSON values: the references, each with the level to reach, or None if it learnt
      nothing, and what `summarise_model` says of every model. A model's `reach` has an
      entry a reference: the first evaluated step that reaches the level (`steps`; else
      None, and `outcome` says why) and how many times fewer these are than the
      reference's (`ratio`). References come first, then the paper's models in its
      order.

    Raises:
      ConfigError: the runs were evaluated on different data, have no reference, or a
        seed stands twice.
    """
    test_set = _common_test_set(runs)
    chance = _chance(runs)
    families = _families(runs)
    models = {
        name: summarise_model(name, members, chance)
        for family, by_rate in families.items()
        for name, members in _named(family, by_rate).items()
    }
    tried: list[str] = []
    if references:
        if unknown := [name for name in references if name not in models]:
            raise _no_reference(f"there is no model --reference={unknown[0]}", models)
        roles = dict.fromkeys(references, "")
    else:
        tried = _baselines(families, models)
        roles = _roles([models[name] for name in tried])
    shown = [models[name] for name in roles]
    shown += [m for name, m in models.items() if name not in (*roles, *tried)]
    levels = [_level(models[name], role) for name, role in roles.items()]
    for model in shown:
        model["reach"] = [_reach(model, level) for level in levels]
    return {
        "references": levels,
        "baselines_tried": [
            {
                key: models[name][key]
                for key in ("name", "initial_rate", "best", "state")
            }
            for name in (tried if len(tried) > 1 else ())
        ],
        "test_set": test_set,
        "chance": chance,
        "evaluation_interval": _evaluation_interval(shown),
        "batch_sizes": sorted({run.config["batch_size"] for run in runs}),
        "models": shown,
    }


def compare_rates(runs: Sequence[Run]) -> dict[str, Any]:
    """The best accuracy of models that differ in nothing but their learning rate.

    Returns:
      JSON values: a list of families, each with a name and with what `summarise_model`
      says of every rate, in their order (`points`).

    Raises:
      ConfigError: the runs were evaluated on different data, or a seed stands twice.
    """
    test_set = _common_test_set(runs)
    chance = _chance(runs)
    families = [
        {
            "name": name,
            "points": [
                summarise_model(f"{name} at {rate:g}", members, chance)
                for rate, members in by_rate.items()
            ],
        }
        for name, by_rate in _families(runs).items()
    ]
    return {"test_set": test_set, "chance": chance, "families": families}


def summarise_model(name: str, runs: Sequence[Run], chance: float) -> dict[str, Any]:
    """What a model's runs showed, as JSON values.

    Args:
      name: of the model.
      runs: that differ in their seed.
      chance: percent that untrained networks get right.

    Raises:
      ConfigError: a seed stands twice, or no step was evaluated in all runs.
    """
    runs = sorted(runs, key=lambda run: run.config["seed"])
    for one, other in itertools.pairwise(runs):
        if one.config["seed"] == other.config["seed"]:
            raise ConfigError(
                f"{one.folder} and {other.folder} both hold {name} with the seed "
                f"{one.config['seed']}: give one of them."
            )
    steps = runs[0].steps
    for run in runs[1:]:
        steps = np.intersect1d(steps, run.steps)
    if not steps.size:
        raise ConfigError(
            f"the seeds of {name} were never evaluated at the same step: expected runs "
            "with the same evaluations; compare them one by one."
        )
    top1 = np.array([run.top1[np.isin(run.steps, steps)] for run in runs])
    mean = top1.mean(axis=0)
    peak = int(np.argmax(mean >= mean.max() - TOLERANCE))
    diverged_at = [run.diverged_at for run in runs]
    finished = all(run.summary is not None for run in runs)
    diverged = any(step is not None for step in diverged_at)
    learnt = bool(mean.max() > _near_chance(chance))
    at_chance = finished and not diverged and not learnt
    return {
        "name": name,
        "variant": runs[0].config["variant"],
        "initial_rate": runs[0].initial_rate,
        "batch_size": runs[0].config["batch_size"],
        "seeds": [run.config["seed"] for run in runs],
        "folders": [str(run.folder) for run in runs],
        "state": _state(runs, at_chance),
        "finished": finished,
        "diverged": diverged,
        "diverged_at": diverged_at,
        "at_chance": at_chance,
        "learnt": learnt,
        "best": {"step": int(steps[peak]), **_spread(top1[:, peak])},
        "final": {kind: _final(runs, kind) for kind in STATISTICS},
        "curve": {
            "steps": steps.tolist(),
            "mean": mean.tolist(),
            "std": top1.std(axis=0, ddof=1).tolist() if len(runs) > 1 else None,
        },
    }


def _families(runs: Sequence[Run]) -> dict[str, dict[float, list[Run]]]:
    """Runs that differ in rate and seed alone, by rate; the paper's models first."""
    order = list(PAPER)
    groups = group_runs(runs, but=SEED_KEYS + RATE_KEYS)

    def place(name: str) -> tuple[int, str]:
        variant = groups[name][0].config["variant"]
        return (order.index(variant) if variant in order else len(order), name)

    families: dict[str, dict[float, list[Run]]] = {}
    for name in sorted(groups, key=place):
        by_rate = families[name] = {}
        for run in sorted(groups[name], key=lambda run: run.initial_rate):
            by_rate.setdefault(run.initial_rate, []).append(run)
    return families


def _named(family: str, by_rate: Mapping[float, list[Run]]) -> dict[str, list[Run]]:
    """The models of a family, with their rates where there are several."""
    if len(by_rate) == 1:
        return {family: next(iter(by_rate.values()))}
    return {f"{family} at {rate:g}": members for rate, members in by_rate.items()}


def _baselines(
    families: Mapping[str, Mapping[float, list[Run]]], models: Collection[str]
) -> list[str]:
    """The models that are Inception without batch normalisation, as the paper has it.

    With He's initial weights, too, which train where others do not.
    """
    variants = {
        family: next(iter(by_rate.values()))[0].config["variant"]
        for family, by_rate in families.items()
    }
    if list(variants.values()).count(BASELINE) != 1:
        problem = "it is not clear which models the others are to be compared with"
        raise _no_reference(problem, models)
    return [
        name
        for family, variant in variants.items()
        if variant in (BASELINE, BASELINE_HE)
        for name in _named(family, families[family])
    ]


def _roles(baselines: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The baseline at the paper's rate and at its best, by name: why they are chosen.

    Either alone misleads: the paper's rate is that of a run of millions of steps, and
    the best of some may be one that the paper does not compare with.
    """
    best = max(baselines, key=lambda m: (m["state"] == FINISHED, m["best"]["mean"]))
    roles: dict[str, list[str]] = {}
    for model in baselines:
        paper_rate = (PAPER[BASELINE].initial_rate or 0) * model["batch_size"]
        if model["variant"] == BASELINE and math.isclose(
            model["initial_rate"], paper_rate / PAPER_BATCH
        ):
            roles.setdefault(model["name"], []).append("the paper's rate")
    if len(baselines) > 1 or not roles:
        the_best = f"the best of {len(baselines)}" if baselines[1:] else ""
        roles.setdefault(best["name"], []).append(the_best)
    return {name: " and ".join(filter(None, why)) for name, why in roles.items()}


def _level(model: Mapping[str, Any], role: str) -> dict[str, Any]:
    """What a reference asks of the others: its best accuracy, if it learnt anything."""
    return {
        "name": model["name"],
        "role": role,
        "level": model["best"]["mean"] if model["learnt"] else None,
        "step": model["best"]["step"],
    }


def _no_reference(problem: str, models: Collection[str]) -> ConfigError:
    return ConfigError(
        f"{problem}: give --reference=NAME, once or twice, of: {'; '.join(models)}."
    )


def _common_test_set(runs: Sequence[Run]) -> dict[str, Any]:
    first = {key: runs[0].config.get(key) for key in TEST_SET_KEYS}
    for run in runs:
        differences = [
            f"{key}: {value} in {runs[0].folder}, {run.config.get(key)} in {run.folder}"
            for key, value in first.items()
            if run.config.get(key) != value
        ]
        if differences:
            raise ConfigError(
                "the runs were not evaluated on the same data: "
                f"{'; '.join(differences)}. Compare runs of one data set."
            )
    return first


def _state(runs: Sequence[Run], at_chance: bool) -> str:
    """How a model's runs ended, or how far they are, in words."""
    words = _divergence([run.diverged_at for run in runs])
    unfinished = [run for run in runs if run.summary is None]
    if unfinished:
        least = min(unfinished, key=lambda run: run.steps[-1])
        words.append(
            f"{_share(len(unfinished), len(runs))}running or stopped at step "
            f"{least.steps[-1]:,} of {least.config['num_steps']:,}"
        )
    if at_chance:
        words.append("stayed at chance")
    return "; ".join(words) or FINISHED


def _divergence(diverged_at: Sequence[int | None]) -> list[str]:
    """Where seeds diverged, in words; nothing if none did."""
    steps = sorted(step for step in diverged_at if step is not None)
    if not steps:
        return []
    first, last = steps[0], steps[-1]
    where = f"step {first:,}" if first == last else f"steps {first:,} to {last:,}"
    return [f"{_share(len(steps), len(diverged_at))}diverged at {where}"]


def _share(count: int, seeds: int) -> str:
    return "" if seeds == 1 else f"{count} of {seeds} seeds "


def _reach(model: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, Any]:
    """The steps to a reference's level, or in words what happened instead."""
    if reference["level"] is None:
        return {"steps": None, "outcome": "the reference is at chance", "ratio": None}
    curve = model["curve"]
    for step, accuracy in zip(curve["steps"], curve["mean"], strict=True):
        if accuracy >= reference["level"] - TOLERANCE:
            ratio = reference["step"] / step if step else None
            return {"steps": step, "outcome": "reached", "ratio": ratio}
    outcome = model["state"]
    if outcome == FINISHED:
        outcome = "never"
    elif not model["finished"] and not model["diverged"]:
        outcome = "not yet"
    return {"steps": None, "outcome": outcome, "ratio": None}


def _spread(values: np.ndarray | Sequence[float]) -> dict[str, Any]:
    """Mean and sample standard deviation over seeds."""
    several = len(values) > 1
    return {
        "mean": float(np.mean(values)),
        "std": float(np.std(values, ddof=1)) if several else None,
        "values": [float(value) for value in values],
    }


def _final(runs: Sequence[Run], kind: str) -> dict[str, Any] | None:
    """Final accuracy by one kind of statistics; None unless all seeds have it."""
    finals = [((run.summary or {}).get("final") or {}).get(kind) for run in runs]
    if not all(finals):
        return None
    return {
        key: _spread([final[key] for final in finals if final])
        for key in ("top1", "top5")
    }


def _chance(runs: Sequence[Run]) -> float:
    """Percent that untrained networks get right, from those that were evaluated."""
    untrained = [run.top1[0] for run in runs if run.steps[0] == 0]
    return float(np.mean(untrained)) if untrained else 0.0


def _near_chance(chance: float) -> float:
    """The accuracy up to which a network has learnt next to nothing.

    Twice chance, as the best of many noisy evaluations is taken and classes are not
    equally frequent; but a tenth of the way to 100% at most.
    """
    return chance + min(chance, (100 - chance) / 10)


def _evaluation_interval(models: Sequence[Mapping[str, Any]]) -> list[int] | None:
    """The least and the greatest number of steps between two evaluations."""
    gaps = [np.diff(model["curve"]["steps"]) for model in models]
    joined = np.concatenate(gaps)
    return [int(joined.min()), int(joined.max())] if joined.size else None
