"""The MNIST experiment from its data to its figures, resumable at every checkpoint."""

import functools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.configuration.fields import ConfigError
from experiments.data.image_set import LoadImageSet, load_image_set
from experiments.distributed import parallel
from experiments.distributed.processes import (
    in_every_process,
    in_first_process,
    print_once,
)
from experiments.mnist import figures
from experiments.mnist.config import CONFIGURATION
from experiments.mnist.experiment import Experiment
from experiments.mnist.measurements import (
    LOGS,
    evaluation_steps,
    measure,
)
from experiments.mnist.summary import as_table, settings, summarise
from experiments.running import dry_run
from experiments.running.figures import save
from experiments.running.loop import Plan, Trained, fit
from experiments.running.metrics import finite
from experiments.running.record import Record
from experiments.running.run_folder import open_run
from experiments.running.workdir import read_json, write_json

MAX_STEPS_PER_CALL = 500  # so that the progress bar moves every second or so
DRY_STEPS = 100  # that a dry run times together


def run(
    config: Mapping[str, Any],
    workdir: Path,
    data_dir: str | None,
    *,
    load: LoadImageSet = load_image_set,
) -> None:
    """Trains, or goes on training, and writes figures and summary.

    Args:
      config: keys as `experiments.mnist.config.FIELDS` describes them.
      workdir: folder for everything that the run writes.
      data_dir: folder of prepared tensorflow-datasets, or None.
      load: reads the images.

    Raises:
      ConfigError, DataError, DeviceError, WorkdirError, CheckpointError: as their
        names say; the message says what to do.
    """
    check_config(config)
    parallel.check_launch(config)
    data = in_every_process(lambda: load(config["dataset"], data_dir))
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
        measured = dry_run.of_replicas(
            Experiment(config, data), DRY_STEPS, len(evaluation_steps(config))
        )
        print_once(dry_run.report(config, measured))
        return
    with open_run(workdir, {**config, "data_checksum": data.checksum}, CONFIGURATION):
        summary_path = workdir / "summary.json"
        if summary_path.exists():
            print_once(f"{workdir} holds this run, finished; nothing to do.")
            print_once(as_table(read_json(summary_path, ["networks"])))
            return
        experiment = Experiment(config, data)
        record = Record(workdir, config, CONFIGURATION, LOGS)
        began = time.monotonic()
        trained = train(experiment, record)
        print_once(f"Trained in {time.monotonic() - began:.1f} s.")
        in_first_process(lambda: _conclude(experiment, trained, workdir))
    print_once(f"Figures, summary.json, metrics and checkpoints are in {workdir}.")


def _conclude(experiment: Experiment, trained: Trained, workdir: Path) -> None:
    """Writes figures and the summary, and prints it."""
    rows, percentiles = trained.rows["metrics"], trained.rows["percentiles"]
    replicas = experiment.replicas._asdict()
    summary = summarise(experiment.config, replicas, rows, percentiles)
    if len(settings(summary)) > 1:
        save(figures.accuracy_against_rate(summary), workdir / "rates")
    else:
        figure = figures.figure1(rows, percentiles, summary)
        save(figure, workdir / "figure1")
    # Last, as it marks the run as finished.
    write_json(workdir / "summary.json", finite(summary))
    print(as_table(summary))


def check_config(config: Mapping[str, Any]) -> None:
    """Checks every value that the configuration's types leave open.

    Raises:
      ConfigError: one makes no sense.
    """
    CONFIGURATION.check(config)


def train(experiment: Experiment, record: Record | None = None) -> Trained:
    """Trains to the last step, with a record, or without keeping anything."""
    config = experiment.config
    last = config["num_steps"]
    kept: dict[str, Any] = {}
    if record is not None:
        kept = {
            "record": record,
            "measure": functools.partial(measure, experiment),
            "evaluations": evaluation_steps(config),
            "saves": {last, *range(0, last, config["checkpoint_every"])},
        }
    plan = Plan(
        num_steps=last,
        steps_per_look=MAX_STEPS_PER_CALL,
        name_replica=experiment.name_replica,
        **kept,
    )
    return fit(experiment.initial_states(), experiment.step, experiment.feed, plan)
