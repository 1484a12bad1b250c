"""The network of the Inception experiment and its compiled functions."""

import functools
import itertools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bn_jax
from experiments.data.distortions import distort
from experiments.data.file_feed import ImageBatch
from experiments.distributed import parallel
from experiments.inception_experiment.scores import Scores, score
from experiments.models.construction import make_model
from experiments.models.inception import KEEP_CONVOLUTIONS, Inception
from experiments.training import evaluation, sgd
from experiments.training.sgd import Batch, TrainState


def learning_rate(config: Mapping[str, Any], step: int) -> float:
    """The rate of a step: an exponential decay in a staircase.

    Args:
      config: keys as `experiments.configs.inception.KEYS` describes them.
      step: steps done before.
    """
    # In this order a whole number of decays is one after rounding, too.
    decays = int(step * config["decay_speed"] / config["steps_per_decay"])
    initial: float = config["learning_rate"] * config["rate_multiple"]
    return initial * config["decay_factor"] ** decays


class Experiment:
    """Trains and measures one network; functions compile when they are first called."""

    def __init__(self, config: Mapping[str, Any], num_classes: int) -> None:
        """Builds the network.

        Args:
          config: keys as `experiments.configs.inception.KEYS` describes them.
          num_classes: of the data.
        """
        self.config = config
        self.model = make_model(config, num_classes)
        self.image_shape = (config["image_size"], config["image_size"], 3)
        self._functions = _compile(
            self.model,
            config["momentum"],
            config["l2_weight"] * config["l2_multiple"],
            config["distortions"],
            config["rematerialise"],
            config["parallelism"],
            config["moments"] != parallel.GLOBAL,
        )
        self._seed = np.int32(config["seed"])

    def initial_state(self) -> TrainState:
        """The state before the first step."""
        key = jax.random.fold_in(jax.random.key(self._seed), 0)
        init = functools.partial(
            sgd.init_state,
            self.model,
            self.image_shape,
            optimiser=self._functions.optimiser,
        )
        state = jax.jit(init)(key, learning_rate(self.config, 0))
        return parallel.replicate(state)

    def train_step(
        self, state: TrainState, step: int, batch: ImageBatch
    ) -> tuple[TrainState, jax.Array]:
        """Goes one step on; returns the new state and the loss, (), not waited for."""
        return self._functions.train_step(*self._step_arguments(state, step, batch))

    def training_memory(self, state: TrainState, batch: ImageBatch) -> Any:
        """What XLA says that a step needs on each device; trains nothing."""
        arguments = self._step_arguments(state, 0, batch)
        lowered = self._functions.train_step.lower(*arguments)
        return lowered.compile().memory_analysis()

    def _step_arguments(
        self, state: TrainState, step: int, batch: ImageBatch
    ) -> tuple[Any, ...]:
        rate = np.float32(learning_rate(self.config, step))
        examples = _shard(batch.images, _positions(batch), batch.labels)
        return state, *examples, self._seed, np.int32(step), rate

    def wait(self, losses: list[jax.Array]) -> None:
        """Keeps the host from running too far ahead of the devices.

        On an accelerator two steps are under way, so that it receives the next batch
        while it computes. On CPU a queue of programs with collectives can deadlock
        forced host devices.

        Args:
          losses: of the steps so far, in order.
        """
        ahead = 0 if jax.default_backend() == "cpu" else 2
        if len(losses) > ahead:
            jax.block_until_ready(losses[-1 - ahead])

    def evaluate(
        self,
        state: TrainState,
        batches: Iterable[ImageBatch],
        by_test_batch: bool = False,
    ) -> Scores:
        """Counts right answers over all batches, by the mean probability of crops.

        Args:
          state: of the network.
          batches: of `experiments.data.file_feed.evaluation_batches`.
          by_test_batch: normalise each batch by its own statistics.
        """
        function = self._functions.scores[by_test_batch]
        total = Scores(0, 0, 0.0, 0)
        for batch in batches:
            scores = jax.device_get(function(state, *_shard(*batch)))
            total = Scores(*(a + b.item() for a, b in zip(total, scores, strict=True)))
        return total

    def probabilities(self, state: TrainState, images: np.ndarray) -> np.ndarray:
        """Class probabilities, (examples, classes), the mean over crops.

        Args:
          state: of the network.
          images: uint8 (examples, crops, size, size, 3).
        """
        return jax.device_get(self._functions.probabilities(state, *_shard(images)))

    def population_statistics(
        self, state: TrainState, first_step: int, batches: Iterable[ImageBatch]
    ) -> Any:
        """`batch_stats` of Algorithm 2, from training batches.

        Args:
          state: of the network, whose parameters stay as they are.
          first_step: the number of the first batch, for its distortions.
          batches: what training would see next.
        """

        def run(gathered: Any, numbered: tuple[int, ImageBatch]) -> Any:
            step, batch = numbered
            found = self._functions.add_batch(
                state._replace(batch_stats=gathered),
                *_shard(batch.images, _positions(batch)),
                self._seed,
                np.int32(step),
            )
            return jax.block_until_ready(found)

        numbered = zip(itertools.count(first_step), batches, strict=False)
        return bn_jax.population_statistics(
            run,
            state.batch_stats,
            numbered,
            keep_unseen=self.model.auxiliary_head,  # which is for training alone
        )


class _Functions(NamedTuple):
    optimiser: optax.GradientTransformation
    train_step: Any
    add_batch: Any
    probabilities: Any
    scores: dict[bool, Any]  # by whether the test batch's own statistics serve


# Runs that differ in rate, seed or length alone share what is compiled.
@functools.lru_cache(maxsize=4)
def _compile(
    model: Inception,
    momentum: float,
    l2_weight: float,
    distortions: str,
    rematerialise: bool,
    parallelism: str,
    average_statistics: bool,
) -> _Functions:
    optimiser = sgd.make_optimiser(momentum, l2_weight)
    policy = KEEP_CONVOLUTIONS if rematerialise else None
    at_inference = model.clone(dropout_rate=0.0, auxiliary_head=False)

    def keys_of(seed: jax.Array, step: jax.Array) -> jax.Array:
        """Of a step's distortions and dropout; key 0 is that of the initial state."""
        return jax.random.split(jax.random.fold_in(jax.random.key(seed), 1 + step))

    def augment(images: jax.Array, positions: jax.Array, key: jax.Array) -> jax.Array:
        # A key an image of the whole batch: the same however it is divided.
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(positions)
        return _centre(distort(keys, _to_float(images), distortions))

    def train_step(
        state: TrainState,
        images: jax.Array,
        positions: jax.Array,
        labels: jax.Array,
        seed: jax.Array,
        step: jax.Array,
        rate: jax.Array,
    ) -> tuple[TrainState, jax.Array]:
        distortion_key, dropout_key = keys_of(seed, step)
        device = jax.lax.axis_index(parallel.DEVICE_AXIS)
        return sgd.train_step(
            model,
            state._replace(opt_state=sgd.with_learning_rate(state.opt_state, rate)),
            Batch(augment(images, positions, distortion_key), labels),
            optimiser=optimiser,
            dropout_key=jax.random.fold_in(dropout_key, device),
            checkpoint_policy=policy,
            average_statistics=average_statistics,
        )

    def add_batch(
        state: TrainState,
        images: jax.Array,
        positions: jax.Array,
        seed: jax.Array,
        step: jax.Array,
    ) -> Any:
        distortion_key, _ = keys_of(seed, step)
        inputs = augment(images, positions, distortion_key)
        found = evaluation.add_batch(at_inference, state, inputs)
        if average_statistics:
            # Devices have as many examples each: the mean counts them all alike.
            return jax.lax.pmean(found, parallel.DEVICE_AXIS)
        return found

    def probabilities(
        state: TrainState, images: jax.Array, *, by_test_batch: bool = False
    ) -> jax.Array:
        examples, crops = images.shape[:2]
        inputs = _centre(_to_float(images)).reshape(-1, *images.shape[2:])
        # As in training, but for dropout; the statistics it leaves are dropped.
        logits: Any
        logits, _ = at_inference.apply(
            state.variables, inputs, train=by_test_batch, mutable=["batch_stats"]
        )
        found = nn.softmax(logits).reshape(examples, crops, -1)
        return jnp.mean(found, axis=1)

    def scores(
        state: TrainState,
        images: jax.Array,
        labels: jax.Array,
        mask: jax.Array,
        *,
        by_test_batch: bool,
    ) -> Scores:
        found = probabilities(state, images, by_test_batch=by_test_batch)
        sums = score(found, labels, mask)
        return jax.lax.psum(sums, parallel.DEVICE_AXIS)

    def gathered(state: TrainState, images: jax.Array) -> jax.Array:
        found = probabilities(state, images)
        return jax.lax.all_gather(found, parallel.DEVICE_AXIS, tiled=True)

    over_devices = functools.partial(parallel.map_over_devices, parallelism=parallelism)
    return _Functions(
        optimiser,
        over_devices(
            train_step,
            in_axes=(None, 0, 0, 0, None, None, None),
            donate_argnums=(0,),
        ),
        over_devices(add_batch, in_axes=(None, 0, 0, None, None)),
        over_devices(gathered, in_axes=(None, 0)),
        {
            by_test_batch: over_devices(
                functools.partial(scores, by_test_batch=by_test_batch),
                in_axes=(None, 0, 0, 0),
            )
            for by_test_batch in (False, True)
        },
    )


def _to_float(images: jax.Array) -> jax.Array:
    return images.astype(jnp.float32) / 255


def _centre(images: jax.Array) -> jax.Array:
    return 2 * images - 1


def _positions(batch: ImageBatch) -> np.ndarray:
    """Of this process' examples in the batch of all processes."""
    count = len(batch.labels)
    return jax.process_index() * count + np.arange(count, dtype=np.int32)


def _shard(*arrays: np.ndarray) -> list[np.ndarray]:
    return [parallel.shard(array, axis=0) for array in arrays]
