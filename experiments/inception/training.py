"""A run of the Inception experiment from its data to its summary, resumable."""

import contextlib
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from experiments.checkpoints.save import Checkpoints
from experiments.configuration.fields import (
    ConfigError,
)
from experiments.data.datasets import NUM_CLASSES, load_splits
from experiments.distributed import parallel
from experiments.distributed.processes import (
    in_every_process,
    in_first_process,
    print_once,
)
from experiments.inception.config import CONFIGURATION
from experiments.inception.data import Data, LoadSplits
from experiments.inception.description import as_table, describe
from experiments.inception.experiment import NETWORK, Experiment
from experiments.inception.network import Inception
from experiments.inception.table import table_rows
from experiments.running import dry_run, provenance
from experiments.running.loop import Plan, Trained, fit
from experiments.running.metrics import finite
from experiments.running.record import Measured, Record, same_run
from experiments.running.run_folder import open_run
from experiments.running.workdir import read_json, write_json
from experiments.training.state import TrainState

POPULATION = "population"  # folder of the final state with Algorithm 2's statistics
# What `as_text` shows of a summary.
SUMMARY_KEYS = (*("config", "num_parameters", "steps", "best", "diverged_at", "final"),)
DRY_STEPS = 3  # that a dry run times together


def run(
    config: Mapping[str, Any],
    workdir: Path,
    data_dir: str | None,
    *,
    network: type[nn.Module] = Inception,
    load: LoadSplits = load_splits,
) -> None:
    """Trains, or goes on training, evaluates, and writes the summary.

    Args:
      config: keys as `experiments.inception.config.FIELDS` describes them.
      workdir: folder for everything that the run writes.
      data_dir: folder of prepared tensorflow-datasets, or None.
      network: the class to train, with `Inception`'s attributes.
      load: opens the training and the test examples.

    Raises:
      ConfigError, DataError, DeviceError, WorkdirError, CheckpointError: as their
        names say; the message says what to do.
    """
    check_config(config)
    data = in_every_process(lambda: Data(config, data_dir, load))
    if config["dry_run"]:
        experiment = Experiment(config, data.train.num_classes, network)
        print_once(dry_run.report(config, _measure(experiment, data)))
        return
    with open_run(workdir, described(config, data), CONFIGURATION):
        summary_path = workdir / "summary.json"
        if summary_path.exists():
            print_once(f"{workdir} holds this run, finished; nothing to do.")
        else:
            examples = data.device_examples() if data.on_device else None
            experiment = Experiment(config, data.train.num_classes, network, examples)
            summary = _train_and_evaluate(experiment, data, workdir)
            # Last, as it marks the run as finished.
            in_first_process(lambda: write_json(summary_path, finite(summary)))
            data.report_undecodable()
        print_once(as_text(read_json(summary_path, SUMMARY_KEYS)))
    print_once(
        f"summary.json, metrics, TensorBoard events and checkpoints are in {workdir}."
    )


def described(config: Mapping[str, Any], data: Data) -> dict[str, Any]:
    """A configuration, and what else the numbers of a run depend on."""
    feed = "device" if data.on_device else "files"
    return {**config, "data": data.description, "feed_used": feed}


def describe_network(
    config: Mapping[str, Any],
    data_dir: str | None,
    *,
    network: type[nn.Module] = Inception,
    load: LoadSplits = load_splits,
) -> str:
    """The layers of the configured network, as text.

    Raises:
      ConfigError, DataError: as `run`; data is looked at for its classes alone, where
        they are not known by the data set's name.
    """
    check_config(config)
    dataset = config["dataset"]
    num_classes = NUM_CLASSES.get(dataset)
    if num_classes is None:
        num_classes = Data(config, data_dir, load).train.num_classes
    experiment = Experiment(config, num_classes, network)
    return as_table(describe(experiment.model, experiment.image_shape))


def check_config(config: Mapping[str, Any]) -> None:
    """Checks every value that the configuration's types leave open.

    Raises:
      ConfigError: one makes no sense.
      DeviceError: a batch does not divide over the devices.
    """
    CONFIGURATION.check(config)
    try:
        table_rows(config["width"], config["pool_projection"])
    except ValueError as error:
        raise ConfigError(f"--config.{error}") from None
    if len(config["input_shift"]) not in (0, 3):
        raise ConfigError(
            f"--config.input_shift={config['input_shift']}: expected three numbers, of "
            "red, green and blue, or ()."
        )
    parallel.check_launch(config)
    parallel.check_divisible(config["eval_batch_size"], "eval_batch_size")


def _train_and_evaluate(
    experiment: Experiment, data: Data, workdir: Path
) -> dict[str, Any]:
    trained = _train(experiment, data, workdir)
    final = None
    if trained.diverged_at is None:
        final = _evaluate_finally(experiment, data, trained, workdir)
    config = experiment.config
    best = max(trained.rows["metrics"], key=lambda row: row["top1"])
    return {
        **provenance.describe(),
        "config": dict(config),
        "data": data.description,
        "num_parameters": sum(
            leaf.size for leaf in jax.tree.leaves(trained.states[NETWORK].params)
        ),
        "steps": trained.step,
        "diverged_at": trained.diverged_at,
        "best": {"step": best["step"], "top1": best["top1"]},
        "final": final,
    }


def _train(experiment: Experiment, data: Data, workdir: Path) -> Trained:
    """Trains to the last step, or to the first loss that is not finite."""
    config = experiment.config
    last = config["num_steps"]
    plan = Plan(
        num_steps=last,
        measure=functools.partial(measure, experiment, data),
        evaluations={0, last, *range(0, last, config["eval_every"])},
        saves={last, *range(0, last, config["checkpoint_every"])},
        record=Record(workdir, config, CONFIGURATION, ["metrics"]),
        stop_if_diverged=True,
        examples_per_step=config["batch_size"],
    )
    states = {NETWORK: experiment.initial_state()}
    return fit(states, experiment.step, data.feed, plan)


def measure(
    experiment: Experiment,
    data: Data,
    step: int,
    states: Mapping[str, TrainState],
    losses: Mapping[str, np.ndarray],
) -> Measured:
    """Evaluates the network while it trains."""
    batches = data.testing(experiment.config["eval_examples"])
    scores = experiment.evaluate(states[NETWORK], batches).percentages()
    row: dict[str, Any] = {
        "step": step,
        "loss": float(losses[NETWORK]) if losses else None,
        "top1": scores["top1"],
        "top5": scores["top5"],
        "test_loss": scores["loss"],
    }
    known = {key: float(row[key]) for key in row if row[key] is not None}
    shown = {"step": f"{step}", "top1": f"{row['top1']:.2f}%"}
    if losses:
        shown["loss"] = f"{row['loss']:.3g}"
    rate = float(experiment.rates(step, 1)[0])
    return Measured(
        {"metrics": [row]}, known | {"learning_rate": rate}, shown, row["top1"]
    )


def _measure(experiment: Experiment, data: Data) -> dry_run.Measured:
    """Trains and evaluates for a moment, and keeps nothing."""
    config = experiment.config
    num_evaluated = config["eval_examples"] or len(data.test)
    with contextlib.closing(data.training(0, 1)) as batches:
        (training_batch,) = batches
    with contextlib.closing(data.testing(config["eval_batch_size"])) as batches:
        (test_batch,) = batches
    state = experiment.initial_state()
    memory = experiment.training_memory(state, training_batch)

    def advance() -> None:
        nonlocal state
        for step in range(DRY_STEPS):
            state, loss = experiment.train_step(state, step, training_batch)
            jax.block_until_ready(loss)

    return dry_run.Measured(
        parameters={config["variant"]: dry_run.count(state.params)},
        num_networks=1,
        memory=memory,
        seconds_per_step=dry_run.seconds(advance) / DRY_STEPS,
        num_evaluations=1 + math.ceil(config["num_steps"] / config["eval_every"]),
        seconds_per_evaluation=num_evaluated
        / config["eval_batch_size"]
        * dry_run.seconds(lambda: experiment.evaluate(state, [test_batch])),
    )


def _evaluate_finally(
    experiment: Experiment, data: Data, trained: Trained, workdir: Path
) -> dict[str, Any]:
    """Accuracy on all test examples, by each kind of statistics."""
    state = trained.states[NETWORK]
    final: dict[str, Any] = {"population": None, "test_batch": None}
    final["moving_average"] = experiment.evaluate(state, data.testing()).percentages()
    if state.batch_stats:
        population = _population_state(experiment, data, trained, workdir)
        final["population"] = experiment.evaluate(
            population, data.testing()
        ).percentages()
        final["test_batch"] = experiment.evaluate(
            state, data.testing(), by_test_batch=True
        ).percentages()
    return final


def _population_state(
    experiment: Experiment, data: Data, trained: Trained, workdir: Path
) -> TrainState:
    """The final state with population statistics, kept for inference elsewhere."""
    with contextlib.closing(
        Checkpoints(workdir / POPULATION, experiment.config)
    ) as checkpoints:
        same = same_run(experiment.config, CONFIGURATION)
        restored = checkpoints.restore_newest(trained.states, same)
        # A run that was extended has an earlier one, too.
        if restored and restored.step == trained.step:
            return restored.states[NETWORK]
        state = trained.states[NETWORK]
        batches = experiment.config["population_batches"]
        statistics = experiment.population_statistics(
            state,
            trained.step,
            data.training(trained.step, trained.step + batches),
        )
        state = parallel.as_global(state._replace(batch_stats=statistics))
        checkpoints.save(trained.step, {NETWORK: state})
        return state


def as_text(summary: Mapping[str, Any]) -> str:
    """The main numbers of a summary, for a terminal."""
    config, best = summary["config"], summary["best"]
    lines = [
        f"{config['variant']}: {summary['num_parameters']:,} parameters, "
        f"{summary['steps']:,} steps, best top-1 {best['top1']:.2f}% "
        f"after {best['step']:,} steps"
    ]
    if summary["diverged_at"] is not None:
        lines.append(f"  diverged at step {summary['diverged_at']:,}")
    for statistics, scores in (summary["final"] or {}).items():
        if scores is not None:
            lines.append(
                f"  in the end, by {statistics.replace('_', ' ')}: top-1 "
                f"{scores['top1']:.2f}%, top-5 {scores['top5']:.2f}%"
            )
    return "\n".join(lines)
