"""The runs of the batch size experiment: data orders, training, what is left to do."""

import contextlib
import functools
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.batch_size.config import CONFIGURATION
from experiments.batch_size.network import (
    NORMALISATIONS,
    Mode,
    Network,
    apply_network,
    init_network,
)
from experiments.batch_size.summary import draw, page, summarise
from experiments.configuration.fields import (
    ConfigError,
    as_tuple,
)
from experiments.data.image_set import ImageSet, LoadImageSet, load_image_set
from experiments.distributed.progress import progress_bar
from experiments.running.figures import save
from experiments.running.loop import Plan, fit
from experiments.running.metrics import MetricsLog, finite
from experiments.running.workdir import open_workdir, write_json, write_whole
from experiments.training.optimisers import make_optimiser, with_learning_rate
from experiments.training.state import TrainState

REFERENCE_BATCH_SIZE = 32  # where rates are as the configuration gives them
EVALUATION_BATCH = 1_000
MAX_STEPS_PER_CALL = 1_000
NETWORK = "network"


class Setting(NamedTuple):
    """What is trained at once: all rates and seeds of one method, order and size."""

    method: str
    order: str
    batch_size: int


class Data(NamedTuple):
    """Images as the network takes them: float32 (examples, 32, 32, 1), from 0 to 1."""

    train_images: jax.Array
    train_labels: Any  # int32 (examples,)
    validation_images: jax.Array
    validation_labels: jax.Array  # int32 (examples,), as the next
    test_images: jax.Array
    test_labels: jax.Array


def run(
    config: dict[str, Any],
    workdir: Path,
    data_dir: str | None,
    *,
    load: LoadImageSet = load_image_set,
) -> None:
    """Trains what is not trained yet, then writes the table and the figure.

    Args:
      config: as `experiments.batch_size.config` has it.
      workdir: folder for the results.
      data_dir: folder of prepared tensorflow-datasets, or None.
      load: reads the images.

    Raises:
      ConfigError: the configuration makes no sense.
      DataError: the data set cannot be read.
      WorkdirError: the workdir cannot be used.
    """
    check(config)
    images = load(config["dataset"], data_dir)
    data = split(images, config)
    described = {**config, "data_checksum": images.checksum}
    with contextlib.ExitStack() as stack:
        stack.enter_context(open_workdir(workdir, described, CONFIGURATION))
        log = stack.enter_context(
            contextlib.closing(MetricsLog(workdir / "results.jsonl"))
        )
        done = {Setting(*(row[field] for field in Setting._fields)) for row in log.rows}
        settings = list(all_settings(config))
        with progress_bar(len(settings), len(done), "setting") as bar:
            for setting in settings:
                if setting in done:
                    continue
                bar.set_postfix_str(" ".join(map(str, setting)), refresh=False)
                log.write(train_setting(setting, config, data, images.num_classes))
                log.flush()
                log.check()
                bar.update()
        summary = summarise(config, log.rows)
        write_json(workdir / "summary.json", finite(summary))
        write_whole(workdir / "batch_size.md", page(summary))
        save(draw(summary), workdir / "batch_size")
    print(page(summary))
    print(
        f"written to {workdir}: batch_size.png, .svg, .md, results.jsonl, summary.json"
    )


def check(config: Mapping[str, Any]) -> None:
    """Checks a configuration.

    Raises:
      ConfigError: a value makes no sense.
    """
    CONFIGURATION.check(config)
    for size in as_tuple(config["batch_sizes"]):
        if config["num_examples"] % size:
            raise ConfigError(
                f"--config.num_examples={config['num_examples']}: expected a multiple "
                f"of every batch size, and {size} is one."
            )


def all_settings(config: Mapping[str, Any]) -> Iterator[Setting]:
    """What is to be trained; where ghost batches would be the whole batch, they are BN.

    The orders of one method and size come after each other: they share a program.
    """
    for size in as_tuple(config["batch_sizes"]):
        for method in as_tuple(config["methods"]):
            if method == "ghost" and size <= config["virtual_batch_size"]:
                continue
            for order in as_tuple(config["orders"]):
                yield Setting(method, order, size)


def split(images: ImageSet, config: Mapping[str, Any]) -> Data:
    """Holds out validation images, and brings all of them to 32 x 32.

    Raises:
      ConfigError: the images are larger, or too few.
    """

    def prepare(pixels: np.ndarray) -> jax.Array:
        margins = [(32 - size) // 2 for size in pixels.shape[1:3]]
        if min(margins) < 0:
            raise ConfigError(
                f"--config.dataset={config['dataset']}: expected images of at most "
                f"32 x 32, got {pixels.shape[1:3]}."
            )
        grey = pixels.mean(-1, dtype=np.float32) / 255
        pads = [
            (margin, 32 - size - margin)
            for margin, size in zip(margins, pixels.shape[1:3], strict=True)
        ]
        return jnp.asarray(np.pad(grey, [(0, 0), *pads])[..., np.newaxis])

    held_out = config["validation_examples"]
    if held_out >= len(images.train_labels):
        raise ConfigError(
            f"--config.validation_examples={held_out}: expected fewer than the "
            f"{len(images.train_labels)} training examples."
        )
    return Data(
        train_images=prepare(images.train_images[:-held_out]),
        train_labels=jnp.asarray(images.train_labels[:-held_out]),
        validation_images=prepare(images.train_images[-held_out:]),
        validation_labels=jnp.asarray(images.train_labels[-held_out:]),
        test_images=prepare(images.test_images),
        test_labels=jnp.asarray(images.test_labels),
    )


def make_order(
    labels: np.ndarray, order: str, config: Mapping[str, Any], size: int, seed: int
) -> np.ndarray:
    """Which example each place of each batch holds.

    Args:
      labels: of the training examples.
      order: "shuffled": random examples; "skewed": random examples of a few random
        classes for each batch.
      config: the configuration.
      size: examples of a batch.
      seed: of the randomness.

    Returns:
      int32 (steps, size).
    """
    random = np.random.default_rng(seed)
    shape = (config["num_examples"] // size, size)
    if order == "shuffled":
        return random.integers(0, len(labels), shape, np.int32)
    classes = np.unique(labels)
    members = [np.flatnonzero(labels == label) for label in classes]
    batches = []
    for _ in range(shape[0]):
        chosen = random.permutation(len(classes))[: config["skewed_classes"]]
        own = [random.choice(members[i], size) for i in chosen]
        batches.append(np.choose(random.integers(0, len(own), size), own))
    return np.asarray(batches, np.int32)


def train_setting(
    setting: Setting, config: Mapping[str, Any], data: Data, num_classes: int
) -> dict[str, Any]:
    """Trains a setting with every rate and seed, side by side.

    Returns:
      A row of results: validation and test accuracy in %, (rates, seeds) each.
    """
    start = time.perf_counter()
    size = setting.batch_size
    factor = (size / REFERENCE_BATCH_SIZE) ** 0.5
    rates = [rate * factor for rate in as_tuple(config["learning_rates"])]
    seeds = [config["first_seed"] + i for i in range(config["num_seeds"])]
    labels = np.asarray(data.train_labels)
    orders = np.stack(
        [make_order(labels, setting.order, config, size, seed) for seed in seeds]
    )
    program = _compiled(setting.method, size, _frozen(config), num_classes)
    initial_rates = jnp.asarray(rates, jnp.float32)

    def step(states: Any, done: int, indices: Any) -> tuple[Any, Any]:
        del done  # states know it
        state, losses = program.train(
            states[NETWORK],
            data,
            jnp.asarray(indices),
            initial_rates,
        )
        return {NETWORK: state}, {NETWORK: losses}

    def feed(first: int, stops: Sequence[int]) -> Generator[tuple[int, np.ndarray]]:
        for stop in stops:
            yield stop - first, orders[:, first:stop]
            first = stop

    def name_replica(_: str, number: int) -> str:
        rate, seed = divmod(number, len(seeds))
        return (
            f"{' '.join(map(str, setting))}, rate {rates[rate]:g}, seed {seeds[seed]}"
        )

    num_steps = config["num_examples"] // size
    plan = Plan(
        num_steps,
        steps_per_look=_piece_length(num_steps),
        name_replica=name_replica,
        shows_progress=False,  # but for the settings
    )
    state = program.init(initial_rates, jnp.asarray(seeds))
    state = fit({NETWORK: state}, step, feed, plan).states[NETWORK]
    validation, test = program.accuracies(state, data)
    return {
        **setting._asdict(),
        "learning_rates": rates,
        "seeds": seeds,
        "validation": np.float64(validation).round(2).tolist(),
        "test": np.float64(test).round(2).tolist(),
        "seconds": round(time.perf_counter() - start, 1),
    }


def _piece_length(num_steps: int) -> int:
    """The longest that divides a run, so that one program serves all of it."""
    pieces = range(1, min(num_steps, MAX_STEPS_PER_CALL) + 1)
    return max(piece for piece in pieces if num_steps % piece == 0)


def _frozen(config: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """A configuration that can be a key."""
    return tuple(
        (k, as_tuple(v) if isinstance(v, list) else v) for k, v in config.items()
    )


class _Program(NamedTuple):
    """Compiled functions of networks side by side, (rates, seeds, ...)."""

    init: Any  # of rates and seeds
    train: Any  # of states, data, (seeds, steps, size) and rates
    accuracies: Any  # of states and data: of validation and test, (rates, seeds)


@functools.lru_cache(maxsize=1)
def _compiled(
    method: str, batch_size: int, frozen: tuple[tuple[str, Any], ...], num_classes: int
) -> _Program:
    config = dict(frozen)
    normalise = NORMALISATIONS[method]
    num_steps = config["num_examples"] // batch_size
    optimiser = make_optimiser(momentum=config["momentum"])

    def mode(train: bool, progress: jax.Array | float) -> Mode:
        first, last = config["ramp"]
        loosened = jnp.clip((progress - first) / (last - first), 0, 1)
        return Mode(
            train=train,
            decay=max(0.0, 1 - batch_size / config["statistics_memory"]),
            epsilon=config["epsilon"],
            virtual_batch_size=config["virtual_batch_size"],
            groups=config["groups"],
            r_max=1 + (config["r_max"] - 1) * loosened,
            d_max=config["d_max"] * loosened,
        )

    def init(rate: jax.Array, seed: jax.Array) -> TrainState:
        network, stats = init_network(
            jax.random.key(seed), as_tuple(config["widths"]), num_classes
        )
        opt_state = with_learning_rate(optimiser.init(network), rate)
        return TrainState(jnp.int32(0), network, stats, opt_state)

    def train_step(
        state: TrainState, images: jax.Array, labels: jax.Array, rate: jax.Array
    ) -> tuple[TrainState, jax.Array]:
        progress = state.step / num_steps

        def loss_of(network: Network) -> tuple[jax.Array, Any]:
            logits, new = apply_network(
                network, state.batch_stats, images, normalise, mode(True, progress)
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), new

        (loss, stats), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        # The rate falls to 0 in a straight line.
        opt_state = with_learning_rate(state.opt_state, rate * (1 - progress))
        updates, opt_state = optimiser.update(grads, opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, stats, opt_state), loss

    def train(
        states: TrainState, data: Data, orders: jax.Array, rates: jax.Array
    ) -> tuple[TrainState, jax.Array]:
        def step(states: TrainState, indices: jax.Array) -> Any:
            images, labels = data.train_images[indices], data.train_labels[indices]
            over_seeds = jax.vmap(train_step, (0, 0, 0, None))
            return jax.vmap(over_seeds, (0, None, None, 0))(
                states, images, labels, rates
            )

        return jax.lax.scan(step, states, jnp.swapaxes(orders, 0, 1))

    def accuracy(state: TrainState, images: jax.Array, labels: jax.Array) -> jax.Array:
        inference = mode(False, 1)

        def guess(image: jax.Array) -> jax.Array:
            logits, _ = apply_network(
                state.params, state.batch_stats, image[None], normalise, inference
            )
            return logits[0].argmax()

        guesses = jax.lax.map(guess, images, batch_size=EVALUATION_BATCH)
        return 100 * jnp.mean(guesses == labels)

    def accuracies(state: TrainState, data: Data) -> tuple[jax.Array, jax.Array]:
        return (
            accuracy(state, data.validation_images, data.validation_labels),
            accuracy(state, data.test_images, data.test_labels),
        )

    return _Program(
        jax.jit(jax.vmap(jax.vmap(init, (None, 0)), (0, None))),
        jax.jit(train),
        jax.jit(jax.vmap(jax.vmap(accuracies, (0, None)), (0, None))),
    )
