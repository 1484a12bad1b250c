"""The network of the Inception experiment and its compiled functions."""

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bn_jax
from experiments.data.device_augmentation import DeviceExamples
from experiments.data.distortions import distort
from experiments.data.file_feed import ImageBatch
from experiments.distributed import parallel
from experiments.inception.construction import make_model
from experiments.inception.network import KEEP_CONVOLUTIONS, Inception
from experiments.inception.scores import Scores, score
from experiments.running import stopping
from experiments.training import evaluation, steps
from experiments.training.optimisers import (
    LENGTHS,
    make_optimiser,
    make_schedule,
    with_learning_rate,
)
from experiments.training.state import TrainState
from experiments.training.steps import Batch

RATES_AT_ONCE = 1_000  # steps whose rates are worked out together

NETWORK = "network"  # what checkpoints call its state


def learning_rates(config: Mapping[str, Any], steps: np.ndarray) -> np.ndarray:
    """The rates of steps, by the numbers of steps done before each; float64.

    Args:
      config: as `experiments.inception.config.FIELDS` describes it.
      steps: whole numbers.
    """
    schedule = make_schedule(
        config["schedule"],
        config["warmup_steps"],
        staircase={
            "transition_steps": config["steps_per_decay"],
            "decay_rate": config["decay_factor"],
            "speed": config["decay_speed"],
        },
        **{name: {length: config["num_steps"]} for name, length in LENGTHS.items()},
    )
    rates: np.ndarray = schedule(np.asarray(steps))
    return rates * config["learning_rate"] * config["rate_multiple"]


class Experiment:
    """Trains and measures one network; functions compile when they are first called."""

    def __init__(
        self,
        config: Mapping[str, Any],
        num_classes: int,
        network: type[nn.Module] = Inception,
        examples: DeviceExamples | None = None,
    ) -> None:
        """Builds the network.

        Args:
          config: as `experiments.inception.config.FIELDS` describes it.
          num_classes: of the data.
          network: the class to build, with `Inception`'s attributes.
          examples: what `step` trains on where it is given indices.
        """
        self.config = config
        self.model = make_model(config, num_classes, network)
        self.image_shape = (config["image_size"], config["image_size"], 3)
        self._functions = _compile(
            self.model,
            config["optimiser"],
            config["momentum"],
            config["l2_weight"] * config["l2_multiple"],
            config["gradient_delay"],
            config["distortions"],
            config["rematerialise"],
            config["parallelism"],
            config["moments"] != parallel.GLOBAL,
        )
        self._seed = np.int32(config["seed"])
        self._rates = functools.lru_cache(maxsize=2)(self._rates_of_block)
        self._examples = examples
        if examples is not None:
            self._on_devices = parallel.replicate((examples.arrays, examples.labels))

    def initial_state(self) -> TrainState:
        """The state before the first step."""
        key = jax.random.fold_in(jax.random.key(self._seed), 0)
        state = self._functions.init(self.image_shape, key, self.rates(0, 1)[0])
        return parallel.replicate(state)

    def rates(self, first: int, count: int) -> np.ndarray:
        """The learning rates of consecutive steps, float32."""
        blocks = range(first // RATES_AT_ONCE, (first + count - 1) // RATES_AT_ONCE + 1)
        rates = np.concatenate([self._rates(block) for block in blocks])
        return rates[first % RATES_AT_ONCE :][:count]

    def _rates_of_block(self, block: int) -> np.ndarray:
        numbers = np.arange(block * RATES_AT_ONCE, (block + 1) * RATES_AT_ONCE)
        return learning_rates(self.config, numbers).astype(np.float32)

    def step(
        self, states: Mapping[str, TrainState], done: int, piece: Any
    ) -> tuple[dict[str, TrainState], dict[str, jax.Array]]:
        """Trains on a piece of `Data.feed`: a batch, or indices of many."""
        if isinstance(piece, ImageBatch):
            state, loss = self.train_step(states[NETWORK], done, piece)
            return {NETWORK: state}, {NETWORK: loss[None]}
        # (devices, steps, 1, examples): there is one network.
        indices = piece[:, :, 0]
        state, losses = self._train_steps(
            states[NETWORK],
            *self._on_devices,
            indices,
            parallel.shard(_positions(piece[0, 0, 0].size * len(piece)), axis=0),
            self._seed,
            np.int32(done),
            self.rates(done, indices.shape[1]),
        )
        return {NETWORK: state}, {NETWORK: losses}

    @functools.cached_property
    def _train_steps(self) -> Any:
        assert self._examples is not None
        return parallel.map_over_devices(
            functools.partial(self._functions.train_steps, self._examples.make),
            in_axes=(None, None, None, 0, 0, None, None, None),
            donate_argnums=(0,),
            parallelism=self.config["parallelism"],
        )

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
        images, labels = _divided(batch.images, batch.labels)
        positions = parallel.shard(_positions(labels.size), axis=0)
        return (
            *(state, images, positions, labels),
            *(self._seed, np.int32(step), self.rates(step, 1)[0]),
        )

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
            stopping.check()
            scores = jax.device_get(function(state, *_divided(*batch)))
            total = Scores(*(a + b.item() for a, b in zip(total, scores, strict=True)))
        return total

    def probabilities(self, state: TrainState, images: np.ndarray) -> np.ndarray:
        """Class probabilities, (examples, classes), the mean over crops.

        Args:
          state: of the network.
          images: uint8 (examples, crops, size, size, 3).
        """
        return jax.device_get(self._functions.probabilities(state, *_divided(images)))

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
                *_divided(batch.images),
                parallel.shard(_positions(len(batch.labels)), axis=0),
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
    init: Any
    train_step: Any
    train_steps: Any  # of one device, and of a function that makes images
    add_batch: Any
    probabilities: Any
    scores: dict[bool, Any]  # by whether the test batch's own statistics serve


# Runs that differ in rate, seed or length alone share what is compiled.
@functools.lru_cache(maxsize=8)
def _compile(
    model: nn.Module,
    optimiser_text: str,
    momentum: float,
    l2_weight: float,
    gradient_delay: int,
    distortions: str,
    rematerialise: bool,
    parallelism: str,
    average_statistics: bool,
) -> _Functions:
    optimiser = make_optimiser(
        optimiser_text, l2_weight, gradient_delay, momentum=momentum
    )
    policy = KEEP_CONVOLUTIONS if rematerialise else None
    at_inference = model.clone(dropout_rate=0.0, auxiliary_head=False)

    def keys_of(seed: jax.Array, step: jax.Array) -> jax.Array:
        """Of a step's distortions and dropout; key 0 is that of the initial state."""
        return jax.random.split(jax.random.fold_in(jax.random.key(seed), 1 + step))

    def keys_at(positions: jax.Array, key: jax.Array) -> jax.Array:
        # A key an image of the whole batch: the same however it is divided.
        return jax.vmap(lambda i: jax.random.fold_in(key, i))(positions)

    def augment(images: jax.Array, positions: jax.Array, key: jax.Array) -> jax.Array:
        keys = keys_at(positions, key)
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
        return steps.train_step(
            model,
            state._replace(opt_state=with_learning_rate(state.opt_state, rate)),
            Batch(augment(images, positions, distortion_key), labels),
            optimiser=optimiser,
            dropout_key=jax.random.fold_in(dropout_key, device),
            checkpoint_policy=policy,
            average_statistics=average_statistics,
        )

    def train_steps(
        make: Callable[..., jax.Array],
        state: TrainState,
        arrays: Any,
        labels: jax.Array,
        indices: jax.Array,
        positions: jax.Array,
        seed: jax.Array,
        first: jax.Array,
        rates: jax.Array,
    ) -> tuple[TrainState, jax.Array]:
        def one(state: TrainState, piece: Any) -> tuple[TrainState, jax.Array]:
            number, index, rate = piece
            distortion_key, _ = keys_of(seed, number)
            # Beside the keys of the distortions, which are those of positions.
            other_key = jax.random.fold_in(distortion_key, np.uint32(2**32 - 1))
            keys = keys_at(positions, other_key)
            images = jax.vmap(make, (None, 0, 0))(arrays, index, keys)
            return train_step(
                state, images, positions, labels[index], seed, number, rate
            )

        numbers = first + jnp.arange(len(indices), dtype=jnp.int32)
        return jax.lax.scan(one, state, (numbers, indices, rates))

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
        jax.jit(
            functools.partial(steps.init_state, model, optimiser=optimiser),
            static_argnums=0,
        ),
        over_devices(
            train_step,
            in_axes=(None, 0, 0, 0, None, None, None),
            donate_argnums=(0,),
        ),
        train_steps,
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


def _positions(count: int) -> np.ndarray:
    """Of this process' examples in the batch of all processes."""
    return jax.process_index() * count + np.arange(count, dtype=np.int32)


def _divided(*arrays: Any) -> list[Any]:
    """Arrays divided over this process' devices, where they are not already."""
    return [
        array if isinstance(array, jax.Array) else parallel.shard(array, axis=0)
        for array in arrays
    ]
