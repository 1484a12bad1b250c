"""Training of networks side by side, with looks at them on the way."""

import functools
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.data.batches import batch_indices
from experiments.mnist.experiment import Replicas
from experiments.running.loop import Plan, fit
from experiments.running.record import Measured
from experiments.training.optimisers import PLAIN_SGD, with_learning_rate
from experiments.training.state import TrainState
from experiments.training.steps import cross_entropy
from experiments.why.networks import Model

STEPS_PER_PIECE = 100  # in one compiled loop
States = Mapping[str, TrainState]  # each with the leading axis (replicas)


class Examples(NamedTuple):
    """Images with their labels, on the devices."""

    images: Any  # (examples, ...), uint8 or float32, as the network takes them
    labels: Any  # (examples,), int32


def train(
    models: Mapping[str, Model],
    replicas: Replicas,
    examples: Examples,
    *,
    num_steps: int,
    batch_size: int,
    look: Callable[[int, States], None] | None = None,
    looks: Collection[int] = (),
) -> States:
    """Trains each network from every replica's start, by plain SGD.

    Args:
      models: by name.
      replicas: what the runs of each network differ in.
      examples: to train on.
      num_steps: how long.
      batch_size: examples a step.
      look: called with the steps done and the states.
      looks: the steps after which it is.

    Returns:
      The states at the end.
    """
    seeds = [int(seed) for seed in replicas.seed]
    keys = jnp.asarray(seeds)

    def step(states: Any, done: int, indices: Any) -> tuple[Any, Any]:
        del done  # the states know it
        trained = {
            name: _train_steps(models[name], state, examples, indices, keys)
            for name, state in states.items()
        }
        return (
            {name: state for name, (state, _) in trained.items()},
            {name: losses for name, (_, losses) in trained.items()},
        )

    def feed(first: int, stops: Sequence[int]) -> Generator[tuple[int, Any]]:
        for stop in stops:
            indices = batch_indices(
                seeds, first, stop - first, len(examples.labels), batch_size
            )
            yield stop - first, indices
            first = stop

    def measure(done: int, states: Any, losses: Any) -> Measured:
        del losses
        assert look is not None
        look(done, states)
        return Measured({}, {}, {})

    plan = Plan(
        num_steps,
        measure=measure,
        evaluations=looks,
        steps_per_look=STEPS_PER_PIECE,
        # One message for each network, not for each of its replicas.
        name_replica=lambda network, _: f"some of {network}",
        shows_progress=False,  # but for the parts
    )
    starts = {name: _init(model, *replicas) for name, model in models.items()}
    return fit(starts, step, feed, plan).states


def loss_of(
    model: Model, params: Any, stats: Any, batch: Examples, key: jax.Array
) -> tuple[jax.Array, Any]:
    """The loss of a training batch, (), and the new statistics."""
    inputs = batch.images.astype(jnp.float32)
    logits, new = model.apply(params, stats, inputs, train=True, key=key)
    return cross_entropy(logits, batch.labels), new


@functools.partial(jax.jit, static_argnums=0)
def accuracy(model: Model, states: TrainState, examples: Examples) -> jax.Array:
    """Percent of examples that each replica classifies right at inference."""

    def of_replica(state: TrainState) -> jax.Array:
        logits, _ = model.apply(
            state.params,
            state.batch_stats,
            examples.images.astype(jnp.float32),
            train=False,
            key=jax.random.key(0),
        )
        return 100 * jnp.mean(logits.argmax(-1) == examples.labels)

    return jax.lax.map(of_replica, states)


def per_seed(replicas: Replicas, values: Any) -> np.ndarray:
    """(replicas, ...) as (settings, seeds, ...), by `make_replicas`' order."""
    values = np.asarray(values)
    num_seeds = len(np.unique(replicas.seed))
    return values.reshape(-1, num_seeds, *values.shape[1:])


@functools.partial(jax.jit, static_argnums=0)
def _init(model: Model, seeds: Any, rates: Any, stds: Any) -> TrainState:
    def init(seed: jax.Array, rate: jax.Array, std: jax.Array) -> TrainState:
        params, stats = model.init(jax.random.key(seed), std)
        opt_state = with_learning_rate(PLAIN_SGD.init(params), rate)
        return TrainState(jnp.int32(0), params, stats, opt_state)

    return jax.vmap(init)(seeds, rates, stds)


@functools.partial(jax.jit, static_argnums=0)
def _train_steps(
    model: Model, states: TrainState, examples: Examples, indices: Any, seeds: Any
) -> tuple[TrainState, jax.Array]:
    """Steps by indices (steps, replicas, batch); also losses (steps, replicas)."""

    def train_step(
        state: TrainState, index: jax.Array, seed: jax.Array
    ) -> tuple[TrainState, jax.Array]:
        batch = Examples(examples.images[index], examples.labels[index])
        key = jax.random.fold_in(jax.random.key(seed), state.step)

        def loss(params: Any) -> tuple[jax.Array, Any]:
            return loss_of(model, params, state.batch_stats, batch, key)

        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        updates, opt_state = PLAIN_SGD.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, stats, opt_state), value

    def step(states: TrainState, index: jax.Array) -> tuple[TrainState, jax.Array]:
        return model.over_replicas(train_step)(states, index, seeds)

    return jax.lax.scan(step, states, indices)
