"""A run of the Inception experiment from its data to its summary, resumable."""

import contextlib
import itertools
import json
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tensorboardX import SummaryWriter

import bn_jax
from experiments.checkpoints.saving import Checkpoints
from experiments.configs.checks import (
    ConfigError,
    check_at_least,
    check_keys,
    check_one_of,
    check_positive,
    check_shares,
)
from experiments.configs.inception import KEYS
from experiments.data.datasets import NUM_CLASSES
from experiments.distributed import parallel, preemption
from experiments.distributed.processes import is_first, on_first, say, together
from experiments.distributed.progress import progress_bar
from experiments.inception_experiment.data import Data
from experiments.inception_experiment.network import Experiment, learning_rate
from experiments.models.construction import INITIALISATIONS
from experiments.models.description import as_table, describe
from experiments.models.inception import POOL_PROJECTIONS, TABLE, table_rows
from experiments.models.layers import ACTIVATIONS
from experiments.running import dry_run
from experiments.running.metrics import MetricsLog, finite
from experiments.running.run_folder import open_run
from experiments.running.workdir import read_json, write_whole
from experiments.training.sgd import TrainState

NETWORK = "network"  # what checkpoints call its state
POPULATION = "population"  # folder of the final state with Algorithm 2's statistics
# Between looks at the losses, where divergence shows, and at whether to stop.
STEPS_PER_LOOK = 20
DRY_STEPS = 3  # that a dry run times together

CHOICES: Mapping[str, Sequence[Any]] = {
    "activation": tuple(ACTIVATIONS),
    "pool_projection": POOL_PROJECTIONS,
    "initialisation": INITIALISATIONS,
    "dtype": ("float32", "bfloat16"),
    "shuffle": ("examples", "shards"),
    "distortions": ("none", "weak", "strong"),
}


def run(config: Mapping[str, Any], workdir: Path, data_dir: str | None) -> None:
    """Trains, or goes on training, evaluates, and writes the summary.

    Args:
      config: keys as `experiments.configs.inception.KEYS` describes them.
      workdir: folder for everything that the run writes.
      data_dir: folder of prepared tensorflow-datasets, or None.

    Raises:
      ConfigError, DataError, DeviceError, WorkdirError, CheckpointError: as their
        names say; the message says what to do.
    """
    check_config(config)
    data = together(lambda: Data(config, data_dir))
    if config["dry_run"]:
        experiment = Experiment(config, data.train.num_classes)
        say(dry_run.report(config, _measure(experiment, data)))
        return
    with open_run(workdir, {**config, "data": data.description}):
        summary_path = workdir / "summary.json"
        if summary_path.exists():
            say(f"{workdir} holds this run, finished; nothing to do.")
        else:
            experiment = Experiment(config, data.train.num_classes)
            summary = _train_and_evaluate(experiment, data, workdir)
            text = json.dumps(finite(summary), indent=2) + "\n"
            # Last, as it marks the run as finished.
            on_first(lambda: write_whole(summary_path, text))
            data.report_undecodable()
        say(as_text(read_json(summary_path)))
    say(f"summary.json, metrics, TensorBoard events and checkpoints are in {workdir}.")


def describe_network(config: Mapping[str, Any], data_dir: str | None) -> str:
    """The layers of the configured network, as text.

    Raises:
      ConfigError, DataError: as `run`; data is looked at for its classes alone, where
        they are not known by the data set's name.
    """
    check_config(config)
    dataset = config["dataset"]
    num_classes = NUM_CLASSES.get(dataset) or Data(config, data_dir).train.num_classes
    experiment = Experiment(config, num_classes)
    return as_table(describe(experiment.model, experiment.image_shape))


def check_config(config: Mapping[str, Any]) -> None:
    """Checks every value that the configuration's types leave open.

    Raises:
      ConfigError: one makes no sense.
      DeviceError: a batch does not divide over the devices.
    """
    check_keys(config, KEYS)
    check_at_least(
        config,
        1,
        *("num_steps", "steps_per_decay", "eval_every", "eval_batch_size"),
        *("population_batches", "checkpoint_every"),
    )
    check_at_least(config, 0, "seed", "eval_examples", "max_undecodable")
    check_at_least(config, -1, "workers")
    check_at_least(config, 2, "batch_size")
    check_at_least(config, 32, "image_size")
    check_positive(
        config,
        *("width", "epsilon", "initial_std", "initial_scale", "learning_rate"),
        *("rate_multiple", "decay_factor", "decay_speed", "min_area", "crop_fraction"),
    )
    check_shares(
        config,
        *("dropout_rate", "decay", "momentum", "l2_weight", "l2_multiple"),
        *("min_area", "crop_fraction", "decay_factor"),
    )
    check_one_of(config, CHOICES)
    try:
        table_rows(config["width"], config["pool_projection"])
    except ValueError as error:
        raise ConfigError(f"--config.{error}") from None
    rows = [row.name for row in TABLE]
    for row in config["per_activation_rows"]:
        if row not in rows:
            raise ConfigError(
                f"--config.per_activation_rows={config['per_activation_rows']}: "
                f"expected some of {rows}."
            )
    parallel.check_launch(config)
    parallel.check_divisible(config["eval_batch_size"], "eval_batch_size")


class _Trained(NamedTuple):
    state: TrainState
    rows: list[dict[str, Any]]
    step: int
    diverged_at: int | None


def _train_and_evaluate(
    experiment: Experiment, data: Data, workdir: Path
) -> dict[str, Any]:
    trained = _train(experiment, data, workdir)
    final = None
    if trained.diverged_at is None:
        final = _evaluate_finally(experiment, data, trained, workdir)
    config, device = experiment.config, jax.local_devices()[0]
    best = max(trained.rows, key=lambda row: row["top1"])
    return {
        "bn_jax": bn_jax.__version__,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "platform": jax.default_backend(),
        "device": device.device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "config": dict(config),
        "data": data.description,
        "num_parameters": sum(
            leaf.size for leaf in jax.tree.leaves(trained.state.params)
        ),
        "steps": trained.step,
        "diverged_at": trained.diverged_at,
        "best": {"step": best["step"], "top1": best["top1"]},
        "final": final,
    }


def _train(experiment: Experiment, data: Data, workdir: Path) -> _Trained:
    """Trains to the last step, or to the first loss that is not finite."""
    config = experiment.config
    last, batch_size = config["num_steps"], config["batch_size"]
    evaluations = {0, last, *range(0, last, config["eval_every"])}
    saves = {last, *range(0, last, config["checkpoint_every"])}
    looks = evaluations | saves | {*range(0, last, STEPS_PER_LOOK)}
    with contextlib.ExitStack() as stack:
        checkpoints = Checkpoints(workdir / "checkpoints", config)
        stack.callback(checkpoints.close)
        state = experiment.initial_state()
        first = 0
        if restored := checkpoints.restore_newest({NETWORK: state}):
            first, state = restored[0], restored[1][NETWORK]
            say(f"Going on from the checkpoint of step {first} in {workdir}.")
        kept = sorted(step for step in evaluations if restored and step <= first)
        log = together(
            lambda: MetricsLog(workdir / "metrics.jsonl", kept, writes=is_first())
        )
        stack.callback(log.close)
        events = SummaryWriter(
            str(workdir / "tensorboard"),
            purge_step=first + 1 if restored else 0,
            write_to_disk=is_first(),
        )
        stack.callback(events.close)

        def measure(step: int, loss: float | None) -> dict[str, Any]:
            batches = data.testing(config["eval_examples"])
            scores = experiment.evaluate(state, batches).percentages()
            row = {
                "step": step,
                "loss": loss,
                "top1": scores["top1"],
                "top5": scores["top5"],
                "test_loss": scores["loss"],
            }
            log.write(row)
            for key, value in row.items():
                if value is not None:
                    events.add_scalar(key, value, step)
            events.add_scalar("learning_rate", learning_rate(config, step), step)
            return row

        if not restored:
            measure(0, None)
        bar = stack.enter_context(
            progress_bar(last * batch_size, first * batch_size, "image")
        )
        batches = stack.enter_context(contextlib.closing(data.training(first, last)))
        must_stop = stack.enter_context(preemption.watch(first))
        losses: list[jax.Array] = []
        for step, batch in zip(itertools.count(first + 1), batches, strict=False):
            state, loss = experiment.train_step(state, step - 1, batch)
            losses.append(loss)
            bar.update(batch_size)
            experiment.wait(losses)
            if step not in looks:
                continue
            found = np.array(jax.device_get(losses))
            losses = []
            if not np.isfinite(found).all():
                diverged_at = step - len(found) + 1 + int(np.isfinite(found).argmin())
                say(f"\nDiverged: the loss of step {diverged_at} is not finite.")
                return _Trained(state, log.rows, diverged_at, diverged_at)
            if step in evaluations:
                row = measure(step, float(found.mean()))
                bar.set_postfix(step=step, loss=row["loss"], top1=f"{row['top1']:.2f}%")
            stopping = must_stop(step)
            if step in saves or stopping:
                # Rows first: a checkpoint promises that those up to it are there.
                log.flush()
                events.flush()
                score = row["top1"] if step in evaluations else None
                checkpoints.save(step, {NETWORK: parallel.as_global(state)}, score)
            if stopping and step < last:
                raise preemption.PreemptedError(
                    f"stopped by SIGTERM; the same command goes on from step {step}."
                )
        return _Trained(state, log.rows, last, None)


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
    experiment: Experiment, data: Data, trained: _Trained, workdir: Path
) -> dict[str, Any]:
    """Accuracy on all test examples, by each kind of statistics."""
    state = trained.state
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
    experiment: Experiment, data: Data, trained: _Trained, workdir: Path
) -> TrainState:
    """The final state with population statistics, kept for inference elsewhere."""
    with contextlib.closing(
        Checkpoints(workdir / POPULATION, experiment.config)
    ) as checkpoints:
        if restored := checkpoints.restore_newest({NETWORK: trained.state}):
            return restored[1][NETWORK]
        batches = experiment.config["population_batches"]
        statistics = experiment.population_statistics(
            trained.state,
            trained.step,
            data.training(trained.step, trained.step + batches),
        )
        state = parallel.as_global(trained.state._replace(batch_stats=statistics))
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
