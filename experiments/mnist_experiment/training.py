"""The MNIST experiment from its data to its figures, resumable at every checkpoint."""

import contextlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import google_crc32c
import jax
import numpy as np

from experiments.checkpoints.saving import Checkpoints
from experiments.configs.checks import (
    ConfigError,
    check_at_least,
    check_keys,
    check_positive,
    check_shares,
)
from experiments.configs.mnist import KEYS
from experiments.data.image_set import load_image_set
from experiments.distributed import parallel, preemption
from experiments.distributed.preemption import PreemptedError
from experiments.distributed.processes import on_first, say, together
from experiments.distributed.progress import progress_bar
from experiments.mnist_experiment import figures
from experiments.mnist_experiment.measurements import Measurements, evaluation_steps
from experiments.mnist_experiment.networks import Experiment
from experiments.mnist_experiment.summary import as_table, settings, summarise
from experiments.running import dry_run
from experiments.running.figures import save
from experiments.running.metrics import finite
from experiments.running.run_folder import open_run
from experiments.running.workdir import read_json, write_whole

MAX_STEPS_PER_CALL = 500  # so that the progress bar moves every second or so
DRY_STEPS = 100  # that a dry run times together


def run(config: Mapping[str, Any], workdir: Path, data_dir: str | None) -> None:
    """Trains, or goes on training, and writes figures and summary.

    Args:
      config: keys as `experiments.configs.mnist.KEYS` describes them.
      workdir: folder for everything that the run writes.
      data_dir: folder of prepared tensorflow-datasets, or None.

    Raises:
      ConfigError, DataError, DeviceError, WorkdirError, CheckpointError: as their
        names say; the message says what to do.
    """
    check_config(config)
    parallel.check_launch(config)
    data = together(lambda: load_image_set(config["dataset"], data_dir))
    if config["batch_size"] > len(data.train_images):
        raise ConfigError(
            f"--config.batch_size={config['batch_size']} is more than the "
            f"{len(data.train_images)} training examples; use a smaller one."
        )
    if min(config["probe_examples"], len(data.test_images)) == 1:
        raise ConfigError(
            "--config.probe_examples: one example alone cannot be normalised; use 0, "
            "or 2 and more of a larger test set."
        )
    if config["dry_run"]:
        say(dry_run.report(config, _measure(Experiment(config, data))))
        return
    fingerprint = f"{google_crc32c.value(data.train_images.tobytes()):08x}"
    with open_run(workdir, {**config, "data_checksum": fingerprint}):
        summary_path = workdir / "summary.json"
        if summary_path.exists():
            say(f"{workdir} holds this run, finished; nothing to do.")
            say(as_table(read_json(summary_path)))
            return
        experiment = Experiment(config, data)
        measurements = _train(experiment, workdir)
        on_first(lambda: _conclude(experiment, measurements, workdir))
    say(f"Figures, summary.json, metrics and checkpoints are in {workdir}.")


def _conclude(
    experiment: Experiment, measurements: Measurements, workdir: Path
) -> None:
    """Writes figures and the summary, and prints it."""
    rows, percentiles = measurements.rows, measurements.percentiles
    replicas = experiment.replicas._asdict()
    summary = summarise(experiment.config, replicas, rows, percentiles)
    if len(settings(summary)) > 1:
        save(figures.accuracy_against_rate(summary), workdir / "rates")
    else:
        figure = figures.figure1(rows, percentiles, summary)
        save(figure, workdir / "figure1")
    # Last, as it marks the run as finished.
    write_whole(workdir / "summary.json", json.dumps(finite(summary), indent=2) + "\n")
    print(as_table(summary))


def check_config(config: Mapping[str, Any]) -> None:
    """Checks every value that the configuration's types leave open.

    Raises:
      ConfigError: one makes no sense.
    """
    check_keys(config, KEYS)
    check_at_least(
        config,
        1,
        *("num_steps", "num_seeds", "hidden", "population_batches", "eval_every"),
        *("early_eval_every", "checkpoint_every", "milestones"),
    )
    check_at_least(config, 2, "batch_size")
    check_at_least(config, 0, "first_seed", "early_steps", "probe_examples")
    check_positive(config, "learning_rate", "initial_std", "epsilon")
    check_shares(config, "decay")
    if not config["hidden"]:
        raise ConfigError("--config.hidden=(): expected at least one hidden layer.")


def _train(experiment: Experiment, workdir: Path) -> Measurements:
    """Trains to the last step; returns what was measured on the way."""
    config = experiment.config
    last = config["num_steps"]
    with contextlib.ExitStack() as stack:
        checkpoints = Checkpoints(workdir / "checkpoints", config)
        stack.callback(checkpoints.close)
        states = experiment.initial_states()
        restored = checkpoints.restore_newest(states)
        step, states = restored or (0, states)
        measurements = together(
            lambda: Measurements(experiment, workdir, step if restored else None)
        )
        stack.callback(measurements.close)
        if restored:
            say(f"Going on from the checkpoint of step {step} in {workdir}.")
        else:
            measurements.measure(0, states, {})
        evaluations = evaluation_steps(config)
        stops = evaluations.union(
            range(0, last, config["checkpoint_every"]),
            range(0, last, MAX_STEPS_PER_CALL),
        )
        first, began = step, time.monotonic()
        bar = stack.enter_context(progress_bar(last, first, "step"))
        must_stop = stack.enter_context(preemption.watch(first))
        diverged: set[str] = set()
        for stop in sorted(stop for stop in stops if stop > first):
            states, losses = experiment.advance(states, step, stop - step)
            bar.update(stop - step)
            step = stop
            for which in sorted(_diverged(experiment, losses) - diverged):
                diverged.add(which)
                say(f"\nDiverged by step {step}: {which}. The others go on.")
            if step in evaluations:
                accuracy = measurements.measure(step, states, losses)
                bar.set_postfix(
                    {name: f"{value.mean():.2f}%" for name, value in accuracy.items()}
                )
            stopping = must_stop(step)
            if step % config["checkpoint_every"] == 0 or step == last or stopping:
                # Rows first: a checkpoint promises that those up to it are there.
                measurements.flush()
                checkpoints.save(step, parallel.as_global(states))
            if stopping and step < last:
                raise PreemptedError(
                    f"stopped by SIGTERM; the same command goes on from step {step}."
                )
    say(f"Trained {last - first} steps in {time.monotonic() - began:.1f} s.")
    return measurements


def _diverged(experiment: Experiment, losses: Mapping[str, np.ndarray]) -> set[str]:
    """The networks whose mean loss is not finite, in words."""
    return {
        f"{name}, " + ", ".join(f"{key} {of[i]:g}" for key, of in replicas.items())
        for replicas in [experiment.replicas._asdict()]
        for name, loss in losses.items()
        for i in np.flatnonzero(~np.isfinite(loss))
    }


def _measure(experiment: Experiment) -> dry_run.Measured:
    """Trains and evaluates for a moment, and keeps nothing."""
    states = experiment.initial_states()
    num_steps = min(DRY_STEPS, experiment.config["num_steps"])
    memory = experiment.training_memory(states, num_steps)
    parameters = {
        name: dry_run.count(jax.tree.map(lambda leaf: leaf[0], state.params))
        for name, state in states.items()
    }

    def advance() -> None:
        nonlocal states
        states, _ = experiment.advance(states, 0, num_steps)

    return dry_run.Measured(
        parameters=parameters,
        num_networks=len(experiment.replicas.seed) * len(states),
        memory=memory,
        seconds_per_step=dry_run.seconds(advance) / num_steps,
        num_evaluations=len(evaluation_steps(experiment.config)),
        seconds_per_evaluation=dry_run.seconds(lambda: experiment.accuracy(states)),
    )
