"""The LSTMs of the experiment, trained side by side as the networks of MNIST are."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import optax

from experiments.configuration.fields import as_tuple
from experiments.data.image_set import ImageSet
from experiments.distributed import parallel
from experiments.mnist.experiment import Experiment, States
from experiments.sequential_mnist.config import NETWORKS
from experiments.sequential_mnist.network import SequenceClassifier
from experiments.training import steps
from experiments.training.state import TrainState


class Seeds(NamedTuple):
    """What the runs that train side by side differ in."""

    seed: np.ndarray  # int (replicas,)


class SequenceExperiment(Experiment):
    """Trains and measures all LSTMs and seeds at once, on all devices."""

    def __init__(self, config: Mapping[str, Any], data: ImageSet) -> None:
        """As `Experiment`, by `experiments.sequential_mnist.config.FIELDS`."""

        def with_rate(learning_rate: float) -> optax.GradientTransformation:
            return optax.chain(
                optax.clip_by_global_norm(config["gradient_norm"]),
                optax.rmsprop(learning_rate, decay=config["rms_decay"]),
            )

        self.optimiser = optax.inject_hyperparams(with_rate)(learning_rate=0.0)
        super().__init__(config, data)

    def make_replicas(self) -> Seeds:
        """One for each seed."""
        first = self.config["first_seed"]
        return Seeds(np.arange(first, first + self.config["num_seeds"]))

    def make_models(self, num_classes: int) -> Mapping[str, nn.Module]:
        """The networks, by name."""
        config = self.config
        same = (
            *("units", "pixels_per_step"),
            *("initial_scale", "initial_noise", "forget_bias"),
        )

        def make(batch_norm: bool, permuted: bool) -> SequenceClassifier:
            return SequenceClassifier(
                num_classes=num_classes,
                batch_norm=batch_norm,
                permutation_seed=config["permutation_seed"] if permuted else None,
                decay=config["decay"],
                epsilon=config["epsilon"],
                **{key: config[key] for key in same},
                **parallel.moments_axes(config["moments"]),
            )

        return {name: make(*NETWORKS[name]) for name in as_tuple(config["networks"])}

    def initial_states(self) -> States:
        """A state a network; networks of one seed start from the same kernels."""

        def init(model: nn.Module, seed: Any) -> TrainState:
            return steps.init_state(
                model,
                (self.num_inputs,),
                jax.random.key(seed),
                self.config["learning_rate"],
                self.optimiser,
            )

        states = {
            name: jax.jit(jax.vmap(functools.partial(init, model)))(self.replicas.seed)
            for name, model in self.models.items()
        }
        return parallel.replicate(states)
