"""The MNIST experiment from its data to its figures, resumable at every checkpoint."""

import functools
import itertools
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import jax
import jax.numpy as jnp
import numpy as np
from tensorboardX import SummaryWriter

from experiments import evaluation, figures, mnist_summary, parallel, training
from experiments.checkpoints import Checkpoints
from experiments.configs.mnist import KEYS
from experiments.configuration import (
    ConfigError,
    as_tuple,
    check_at_least,
    check_keys,
    check_positive,
)
from experiments.data.batches import batch_indices
from experiments.data.image_set import ImageSet, load_image_set, to_inputs
from experiments.metrics import MetricsLog
from experiments.models.mlp import MLP
from experiments.progress import progress_bar
from experiments.training import TrainState
from experiments.workdir import open_workdir, write_whole

MAX_STEPS_PER_CALL = 500  # so that the progress bar moves every second or so
PERCENTILES = (15, 50, 85)  # those of the paper's figure 1

States = dict[str, TrainState]


class Replicas(NamedTuple):
    """What the runs that train side by side differ in; an array (replicas,) each."""

    seed: np.ndarray  # int
    learning_rate: np.ndarray  # float
    initial_std: np.ndarray  # float


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
    parallel.check_divisible(config["batch_size"])
    data = load_image_set(config["dataset"], data_dir)
    if config["batch_size"] > len(data.train_images):
        raise ConfigError(
            f"--config.batch_size={config['batch_size']} is more than the "
            f"{len(data.train_images)} training examples; use a smaller one."
        )
    fingerprint = f"{google_crc32c.value(data.train_images.tobytes()):08x}"
    with open_workdir(workdir, {**config, "data_checksum": fingerprint}):
        summary_path = workdir / "summary.json"
        if summary_path.exists():
            print(f"{workdir} holds this run, finished; nothing to do.")
            print(mnist_summary.as_table(json.loads(summary_path.read_text())))
            return
        experiment = _Experiment(config, data)
        rows, percentiles = _train(experiment, workdir)
        replicas = experiment.replicas._asdict()
        summary = mnist_summary.summarise(config, replicas, rows, percentiles)
        if len(mnist_summary.settings(summary)) > 1:
            figures.save(figures.accuracy_against_rate(summary), workdir / "rates")
        else:
            figure = figures.figure1(rows, percentiles, summary)
            figures.save(figure, workdir / "figure1")
        # Last, as it marks the run as finished.
        write_whole(summary_path, json.dumps(summary, indent=2) + "\n")
    print(mnist_summary.as_table(summary))
    print(f"Figures, summary.json, metrics and checkpoints are in {workdir}.")


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
    if not 0 <= config["decay"] <= 1:
        raise ConfigError(f"--config.decay={config['decay']}: expected 0 to 1.")
    if not config["hidden"]:
        raise ConfigError("--config.hidden=(): expected at least one hidden layer.")


def make_replicas(config: Mapping[str, Any]) -> Replicas:
    """Every learning rate with every initial deviation and every seed."""
    seeds = range(config["first_seed"], config["first_seed"] + config["num_seeds"])
    rows = itertools.product(
        as_tuple(config["learning_rate"]), as_tuple(config["initial_std"]), seeds
    )
    rates, stds, repeated_seeds = zip(*rows, strict=True)
    return Replicas(np.array(repeated_seeds), np.array(rates), np.array(stds))


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


class _Experiment:
    """Compiled functions over data that lies on the devices."""

    def __init__(self, config: Mapping[str, Any], data: ImageSet) -> None:
        self.config = config
        self.replicas = make_replicas(config)
        network = functools.partial(
            MLP,
            hidden=tuple(config["hidden"]),
            num_classes=data.num_classes,
            decay=config["decay"],
            epsilon=config["epsilon"],
            axis_name=parallel.DEVICE_AXIS,
        )
        self.models = {
            "baseline": network(batch_norm=False),
            "batch_norm": network(batch_norm=True),
        }
        self.pixel_scale = 1.0 if config["binarise"] else 1 / 255
        images = to_inputs(data.train_images, config["binarise"])
        self.num_inputs = images.shape[1]
        self._train_data = parallel.replicate((images, data.train_labels))
        test_images = to_inputs(data.test_images, config["binarise"])
        padded = evaluation.pad_and_mask(
            test_images, data.test_labels, jax.local_device_count()
        )
        self._test_data = [parallel.shard(array, axis=0) for array in padded]
        self._num_test = len(test_images)
        self._probe = jnp.asarray(test_images[: config["probe_examples"]])

        def bind(function: Any) -> Any:
            return functools.partial(function, self.models, self.pixel_scale)

        self._train_steps = parallel.map_over_devices(
            bind(training.train_steps),
            in_axes=(None, None, None, 0),
            donate_argnums=(0,),
        )
        self._population = parallel.map_over_devices(
            bind(evaluation.population_statistics), in_axes=(None, None, None, 0)
        )
        self._count_correct = parallel.map_over_devices(
            bind(evaluation.count_correct), in_axes=(None, 0, 0, 0)
        )
        self._sigmoid_inputs = jax.jit(bind(evaluation.sigmoid_inputs))

    def initial_states(self) -> States:
        """A state a network; networks of one seed start from the same weights."""

        def init(name: str, seed: Any, rate: Any, std: Any) -> TrainState:
            model = self.models[name].clone(initial_std=std)
            key = jax.random.key(seed)
            return training.init_state(model, self.num_inputs, key, rate)

        states = {
            name: jax.jit(jax.vmap(functools.partial(init, name)))(*self.replicas)
            for name in self.models
        }
        return parallel.replicate(states)

    def advance(self, states: States, step: int, num_steps: int) -> tuple[States, Any]:
        """Trains from `step` on; returns new states and the mean losses (replicas,)."""
        indices = self._indices(step, num_steps)
        states, losses = self._train_steps(states, *self._train_data, indices)
        # Waits: a queue of steps with collectives can deadlock forced host devices.
        return states, jax.device_get(losses)

    def accuracy(self, states: States) -> dict[str, np.ndarray]:
        """Percent of the test set that is classified right: (replicas,) a network."""
        correct = jax.device_get(self._count_correct(states, *self._test_data))
        return {name: 100 * hits / self._num_test for name, hits in correct.items()}

    def population_accuracy(self, states: States, step: int) -> dict[str, np.ndarray]:
        """Accuracy with Algorithm 2's statistics, from the batches after `step`."""
        indices = self._indices(step, self.config["population_batches"])
        statistics = self._population(states, *self._train_data, indices)
        return self.accuracy(
            {
                name: state._replace(batch_stats=statistics[name])
                for name, state in states.items()
            }
        )

    def sigmoid_percentiles(self, states: States) -> dict[str, np.ndarray]:
        """Of the sigmoids' inputs: (replicas, percentiles, units) a network."""
        inputs = jax.device_get(self._sigmoid_inputs(states, self._probe))
        return {
            name: np.moveaxis(np.percentile(values, PERCENTILES, axis=1), 0, 1)
            for name, values in inputs.items()
        }

    def _indices(self, step: int, num_steps: int) -> Any:
        indices = batch_indices(
            [int(seed) for seed in self.replicas.seed],
            step,
            num_steps,
            len(self._train_data[1]),
            self.config["batch_size"],
        )
        return parallel.shard(indices, axis=2)


def _train(
    experiment: _Experiment, workdir: Path
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Trains to the last step; returns the rows of metrics and of percentiles."""
    config = experiment.config
    checkpoints = Checkpoints(workdir / "checkpoints")
    states = experiment.initial_states()
    restored = checkpoints.restore_newest(states)
    first, states = restored if restored else (0, states)
    if first:
        print(f"Going on from the checkpoint of step {first} in {workdir}.")
    metrics = MetricsLog(workdir / "metrics.jsonl", first if restored else None)
    percentiles = MetricsLog(workdir / "percentiles.jsonl", first if restored else None)
    events = SummaryWriter(
        str(workdir / "tensorboard"), purge_step=first + 1 if restored else 0
    )

    def measure(step: int, losses: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        accuracy = experiment.accuracy(states)
        population = {}
        if step in milestone_steps(config):
            population = experiment.population_accuracy(states, step)
        for name, values in accuracy.items():
            row = {"step": step, "network": name, "accuracy": values.tolist()}
            if name in losses:
                row["loss"] = losses[name].tolist()
            if name in population:
                row["population_accuracy"] = population[name].tolist()
            metrics.write(row)
            for replica, value in enumerate(values):
                events.add_scalar(f"accuracy/{name}/{replica}", value, step)
            for replica, value in enumerate(losses.get(name, ())):
                events.add_scalar(f"loss/{name}/{replica}", value, step)
        if config["probe_examples"]:
            for name, values in experiment.sigmoid_percentiles(states).items():
                rounded = np.round(values.astype(float), 4).tolist()
                percentiles.write({"step": step, "network": name, "values": rounded})
        return accuracy

    steps = evaluation_steps(config)
    if not restored:
        measure(0, {})
    stops = steps | set(range(0, config["num_steps"], config["checkpoint_every"]))
    stops |= set(range(0, config["num_steps"], MAX_STEPS_PER_CALL))
    began = time.monotonic()
    with progress_bar(config["num_steps"], first, "step") as bar:
        step = first
        for stop in sorted(stop for stop in stops if stop > first):
            states, losses = experiment.advance(states, step, stop - step)
            bar.update(stop - step)
            step = stop
            if step in steps:
                accuracy = measure(step, losses)
                bar.set_postfix(
                    {name: f"{value.mean():.2f}%" for name, value in accuracy.items()}
                )
            if step % config["checkpoint_every"] == 0 or step == config["num_steps"]:
                for log in (metrics, percentiles, events):
                    log.flush()
                checkpoints.save(step, states)
    checkpoints.close()
    for log in (metrics, percentiles, events):
        log.close()
    seconds = time.monotonic() - began
    print(f"Trained {config['num_steps'] - first} steps in {seconds:.1f} s.")
    return metrics.rows, percentiles.rows
