"""The experiment from its data to its figure, resumable at every checkpoint."""

import functools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.configuration.fields import ConfigError
from experiments.data.image_set import ImageSet, LoadImageSet, load_image_set
from experiments.distributed import parallel
from experiments.distributed.processes import (
    in_every_process,
    in_first_process,
    print_once,
)
from experiments.mnist.experiment import States
from experiments.mnist.measurements import rows_and_scalars
from experiments.running import dry_run
from experiments.running.figures import save
from experiments.running.loop import Plan, Trained, fit
from experiments.running.metrics import finite
from experiments.running.record import Measured, Record
from experiments.running.run_folder import open_run
from experiments.running.workdir import read_json, write_json, write_whole
from experiments.sequential_mnist.config import CONFIGURATION
from experiments.sequential_mnist.experiment import SequenceExperiment
from experiments.sequential_mnist.summary import draw, page, summarise

MAX_STEPS_PER_CALL = 100  # so that the progress bar moves
DRY_STEPS = 20  # that a dry run times together


def run(
    config: Mapping[str, Any],
    workdir: Path,
    data_dir: str | None,
    *,
    load: LoadImageSet = load_image_set,
) -> None:
    """Trains, or goes on training, and writes the figure and the summary.

    Args:
      config: keys as `experiments.sequential_mnist.config.FIELDS` describes them.
      workdir: folder for everything that the run writes.
      data_dir: folder of prepared tensorflow-datasets, or None.
      load: reads the images.

    Raises:
      ConfigError, DataError, DeviceError, WorkdirError, CheckpointError: as their
        names say; the message says what to do.
    """
    CONFIGURATION.check(config)
    parallel.check_launch(config)
    data = in_every_process(lambda: load(config["dataset"], data_dir))
    check_data(config, data)
    if config["dry_run"]:
        measured = dry_run.of_replicas(
            SequenceExperiment(config, data),
            DRY_STEPS,
            config["num_steps"] // config["eval_every"] + 1,
        )
        print_once(dry_run.report(config, measured))
        return
    with open_run(workdir, {**config, "data_checksum": data.checksum}, CONFIGURATION):
        summary_path = workdir / "summary.json"
        if summary_path.exists():
            print_once(f"{workdir} holds this run, finished; nothing to do.")
            print_once(page(read_json(summary_path, ["networks"])))
            return
        experiment = SequenceExperiment(config, data)
        began = time.monotonic()
        record = Record(workdir, config, CONFIGURATION, ["metrics"])
        trained = train(experiment, record)
        print_once(f"Trained in {time.monotonic() - began:.1f} s.")
        in_first_process(lambda: _conclude(config, trained, workdir))
    print_once(f"Figure, results.md, metrics and checkpoints are in {workdir}.")


def check_data(config: Mapping[str, Any], data: ImageSet) -> None:
    """Checks a configuration beside the data.

    Raises:
      ConfigError: they do not fit.
    """
    pixels = int(np.prod(data.train_images.shape[1:]))
    if pixels % config["pixels_per_step"]:
        raise ConfigError(
            f"--config.pixels_per_step={config['pixels_per_step']}: expected a divisor "
            f"of the {pixels} values of an image."
        )
    if config["batch_size"] > len(data.train_images):
        raise ConfigError(
            f"--config.batch_size={config['batch_size']} is more than the "
            f"{len(data.train_images)} training examples; use a smaller one."
        )


def train(experiment: SequenceExperiment, record: Record) -> Trained:
    """Trains to the last step, or goes on."""
    config, last = experiment.config, experiment.config["num_steps"]
    plan = Plan(
        num_steps=last,
        measure=functools.partial(measure, experiment),
        evaluations={last, *range(0, last, config["eval_every"])},
        saves={last, *range(0, last, config["checkpoint_every"])},
        record=record,
        steps_per_look=MAX_STEPS_PER_CALL,
        name_replica=experiment.name_replica,
    )
    return fit(experiment.initial_states(), experiment.step, experiment.feed, plan)


def measure(
    experiment: SequenceExperiment,
    step: int,
    states: States,
    losses: Mapping[str, np.ndarray],
) -> Measured:
    """Evaluates every network on the test set.

    Returns:
      A row a network with accuracy in percent, mean training loss since the last look
      and, in the end, accuracy with population statistics: (seeds,) each.
    """
    measured = {"accuracy": experiment.accuracy(states), "loss": losses}
    if step == experiment.config["num_steps"]:
        population = experiment.population_accuracy(states, step)
        measured["population_accuracy"] = population
    rows, scalars = rows_and_scalars(step, states, measured, experiment.replicas.seed)
    shown = {
        name: f"{value.mean():.2f}%" for name, value in measured["accuracy"].items()
    }
    return Measured(rows={"metrics": rows}, scalars=scalars, shown=shown)


def _conclude(config: Mapping[str, Any], trained: Trained, workdir: Path) -> None:
    """Writes the figure and the summary, and prints it."""
    summary = summarise(config, trained.rows["metrics"])
    save(draw(summary), workdir / "accuracy")
    write_whole(workdir / "results.md", page(summary))
    # Last, as it marks the run as finished.
    write_json(workdir / "summary.json", finite(summary))
    print(page(summary))
