"""The networks of the MNIST experiment, compiled over data that lies on the devices."""

import functools
import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.configuration.fields import as_tuple
from experiments.data.device_feed import DeviceFeed
from experiments.data.image_set import ImageSet, to_inputs
from experiments.distributed import parallel
from experiments.mnist.network import MLP
from experiments.training import evaluation, steps
from experiments.training.optimisers import PLAIN_SGD
from experiments.training.state import TrainState

States = Mapping[str, TrainState]


class Replicas(NamedTuple):
    """What the runs that train side by side differ in; an array (replicas,) each."""

    seed: np.ndarray  # int
    learning_rate: np.ndarray  # float
    initial_std: np.ndarray  # float


def make_replicas(config: Mapping[str, Any]) -> Replicas:
    """Every learning rate with every initial deviation and every seed."""
    seeds = range(config["first_seed"], config["first_seed"] + config["num_seeds"])
    rows = itertools.product(
        as_tuple(config["learning_rate"]), as_tuple(config["initial_std"]), seeds
    )
    rates, stds, repeated_seeds = zip(*rows, strict=True)
    return Replicas(np.array(repeated_seeds), np.array(rates), np.array(stds))


class Experiment:
    """Trains and measures all networks and replicas at once, on all devices."""

    optimiser: optax.GradientTransformation = PLAIN_SGD

    def __init__(self, config: Mapping[str, Any], data: ImageSet) -> None:
        """Puts the data on the devices; functions compile when they are first called.

        Args:
          config: keys as `experiments.mnist.config.FIELDS` describes them.
          data: training and test images.
        """
        self.config = config
        self.replicas = self.make_replicas()
        self.models = self.make_models(data.num_classes)
        self.pixel_scale = 1.0 if config["binarise"] else 1 / 255
        images = to_inputs(data.train_images, config["binarise"])
        self.num_inputs = images.shape[1]
        self._train_data = parallel.replicate((images, data.train_labels))
        self.feed = DeviceFeed(
            [int(seed) for seed in self.replicas.seed],
            len(images),
            config["batch_size"],
        )
        test_images = to_inputs(data.test_images, config["binarise"])
        padded = evaluation.pad_and_mask(
            test_images, data.test_labels, jax.device_count()
        )
        self._test_data = [
            parallel.shard(parallel.own_part(array, axis=0), axis=0) for array in padded
        ]
        self._num_test = len(test_images)
        self._probe = jnp.asarray(test_images[: config.get("probe_examples", 0)])

        def bind(function: Any, **options: Any) -> Any:
            return functools.partial(function, self.models, self.pixel_scale, **options)

        over_devices = functools.partial(
            parallel.map_over_devices, parallelism=config["parallelism"]
        )
        average = {"average_statistics": config["moments"] != parallel.GLOBAL}
        self._train_steps = over_devices(
            bind(steps.train_steps, optimiser=self.optimiser, **average),
            in_axes=(None, None, None, 0),
            donate_argnums=(0,),
        )
        self._population = over_devices(
            bind(evaluation.population_statistics, **average),
            in_axes=(None, None, None, 0),
        )
        self._count_correct = over_devices(
            bind(evaluation.count_correct), in_axes=(None, 0, 0, 0)
        )
        self._sigmoid_inputs = jax.jit(bind(evaluation.sigmoid_inputs))

    def make_replicas(self) -> Any:
        """What the runs that train side by side differ in, `seed` and more."""
        return make_replicas(self.config)

    def make_models(self, num_classes: int) -> Mapping[str, nn.Module]:
        """The networks, by name."""
        network = functools.partial(
            MLP,
            hidden=tuple(self.config["hidden"]),
            num_classes=num_classes,
            decay=self.config["decay"],
            epsilon=self.config["epsilon"],
            **parallel.moments_axes(self.config["moments"]),
        )
        return {
            "baseline": network(batch_norm=False),
            "batch_norm": network(batch_norm=True),
        }

    def name_replica(self, network: str, replica: int) -> str:
        """What a replica of a network differs from the others in, in words."""
        values = [
            f"{key} {of[replica]:g}" for key, of in self.replicas._asdict().items()
        ]
        return ", ".join([network, *values])

    def initial_states(self) -> States:
        """A state a network; networks of one seed start from the same weights."""

        def init(name: str, seed: Any, rate: Any, std: Any) -> TrainState:
            model = self.models[name].clone(initial_std=std)
            key = jax.random.key(seed)
            return steps.init_state(model, (self.num_inputs,), key, rate)

        states = {
            name: jax.jit(jax.vmap(functools.partial(init, name)))(*self.replicas)
            for name in self.models
        }
        return parallel.replicate(states)

    def step(self, states: States, done: int, indices: Any) -> tuple[States, Any]:
        """Trains on a piece of the feed; returns new states and (steps, replicas)."""
        del done  # the order is in the feed, and nothing else depends on it
        return self._train_steps(states, *self._train_data, indices)

    def training_memory(self, states: States, num_steps: int) -> Any:
        """What XLA says that `step` needs on each device; trains nothing."""
        indices = self.feed.indices(0, num_steps)
        lowered = self._train_steps.lower(states, *self._train_data, indices)
        return lowered.compile().memory_analysis()

    def accuracy(self, states: States) -> dict[str, np.ndarray]:
        """Percent of the test set that is classified right: (replicas,) a network."""
        correct = jax.device_get(self._count_correct(states, *self._test_data))
        return {name: 100 * hits / self._num_test for name, hits in correct.items()}

    def population_statistics(self, states: States, step: int) -> Any:
        """A network's statistics by Algorithm 2, from the batches after `step`."""
        indices = self.feed.indices(step, self.config["population_batches"])
        return self._population(states, *self._train_data, indices)

    def population_accuracy(self, states: States, step: int) -> dict[str, np.ndarray]:
        """Accuracy with the statistics of `population_statistics`."""
        statistics = self.population_statistics(states, step)
        jax.block_until_ready(statistics)
        return self.accuracy(
            {
                name: state._replace(batch_stats=statistics[name])
                for name, state in states.items()
            }
        )

    def sigmoid_percentiles(self, states: States) -> dict[str, np.ndarray]:
        """Of the sigmoids' inputs: (replicas, percentiles, units) a network."""
        own = parallel.one_copy(states)
        inputs = jax.device_get(self._sigmoid_inputs(own, self._probe))
        return {
            name: np.moveaxis(
                np.percentile(values, evaluation.PERCENTILES, axis=1), 0, 1
            )
            for name, values in inputs.items()
        }
