"""One training step, and many steps of many networks in one compiled loop."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from experiments.distributed.parallel import DEVICE_AXIS
from experiments.training.optimisers import PLAIN_SGD, with_learning_rate
from experiments.training.state import TrainState

AUXILIARY_WEIGHT = 0.3  # of the loss of an auxiliary head (GoogLeNet)


class Batch(NamedTuple):
    """Examples of one step on one device."""

    inputs: jax.Array  # (examples, ...), float32
    labels: jax.Array  # (examples,), int32


def init_state(
    model: nn.Module,
    input_shape: tuple[int, ...],
    key: jax.Array,
    learning_rate: float | jax.Array,
    optimiser: optax.GradientTransformation = PLAIN_SGD,
) -> TrainState:
    """The state before the first step.

    Args:
      model: called as model(inputs, train=...).
      input_shape: of one example.
      key: a random key for the weights.
      learning_rate: SGD's; may be traced.
      optimiser: of `make_optimiser`.
    """
    variables = model.init(
        {"params": key, "dropout": key}, jnp.zeros((1, *input_shape)), train=True
    )
    params = variables["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=variables.get("batch_stats", {}),
        opt_state=with_learning_rate(optimiser.init(params), learning_rate),
    )


def train_step(
    model: nn.Module,
    state: TrainState,
    batch: Batch,
    *,
    optimiser: optax.GradientTransformation = PLAIN_SGD,
    dropout_key: jax.Array | None = None,
    checkpoint_policy: Callable[..., bool] | None = None,
    average_statistics: bool = False,
) -> tuple[TrainState, jax.Array]:
    """One step of SGD on the mean cross-entropy over all devices' batches.

    Runs on one device, inside a map that names `DEVICE_AXIS`.

    Args:
      model: called as model(inputs, train=...); it returns logits, or a pair of them
        and an auxiliary head's.
      state: before the step.
      batch: this device's share of the examples.
      optimiser: of `make_optimiser`.
      dropout_key: this device's, where the model has dropout.
      checkpoint_policy: of `jax.checkpoint`: what the backward pass keeps when it
        computes the rest again. None keeps all it needs.
      average_statistics: keep the mean of the devices' `batch_stats`, for a model that
        does not share its moments over all of them.

    Returns:
      The new state and the loss, (), float32; both the same on all devices.
    """
    rngs = None if dropout_key is None else {"dropout": dropout_key}

    def loss_of(params: Any) -> tuple[jax.Array, Any]:
        variables = state._replace(params=params).variables
        logits, updated = model.apply(
            variables, batch.inputs, train=True, mutable=["batch_stats"], rngs=rngs
        )
        return cross_entropy(logits, batch.labels), updated.get("batch_stats", {})

    if checkpoint_policy is not None:
        loss_of = jax.checkpoint(loss_of, policy=checkpoint_policy)
    (loss, batch_stats), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    # Averaged after the gradient: averaging the loss inside it would give each
    # device's gradient a second sum over devices.
    loss, grads = jax.lax.pmean((loss, grads), DEVICE_AXIS)
    if average_statistics:
        batch_stats = jax.lax.pmean(batch_stats, DEVICE_AXIS)
    updates, opt_state = optimiser.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, batch_stats, opt_state), loss


def cross_entropy(
    logits: jax.Array | tuple[jax.Array, jax.Array], labels: jax.Array
) -> jax.Array:
    """Mean softmax cross-entropy, (), float32.

    Args:
      logits: (examples, classes); or a pair, whose second counts `AUXILIARY_WEIGHT`.
      labels: (examples,), int32.
    """
    losses = optax.softmax_cross_entropy_with_integer_labels
    if isinstance(logits, tuple):
        main, auxiliary = (jnp.mean(losses(head, labels)) for head in logits)
        return main + AUXILIARY_WEIGHT * auxiliary
    return jnp.mean(losses(logits, labels))


def map_networks(
    function: Callable[..., Any],
    models: Mapping[str, nn.Module],
    states: Mapping[str, TrainState],
    *per_replica: Any,
) -> dict[str, Any]:
    """Calls function(model, state, *per_replica) for every network and replica.

    Args:
      function: of one replica of one network.
      models: the networks by name.
      states: a state a network; every array has a leading axis (replicas).
      *per_replica: further arguments, whose arrays have that axis too.

    Returns:
      For each network the results, stacked along the axis (replicas).
    """
    return {
        name: _map_replicas(
            functools.partial(function, model), states[name], *per_replica
        )
        for name, model in models.items()
    }


def _map_replicas(function: Callable[..., Any], *arguments: Any) -> Any:
    if len(jax.tree.leaves(arguments)[0]) > 1:
        return jax.vmap(function)(*arguments)
    # On CPU products of stacked matrices are slower, be it a stack of one: a step of
    # the MNIST network takes a quarter longer.
    results = function(*jax.tree.map(lambda array: array[0], arguments))
    return jax.tree.map(lambda result: result[None], results)


def train_steps(
    models: Mapping[str, nn.Module],
    pixel_scale: float,
    states: Mapping[str, TrainState],
    images: jax.Array,
    labels: jax.Array,
    indices: jax.Array,
    *,
    optimiser: optax.GradientTransformation = PLAIN_SGD,
    average_statistics: bool = False,
) -> tuple[dict[str, TrainState], dict[str, jax.Array]]:
    """Many steps of several networks, of several replicas each, in one `lax.scan`.

    Every network sees the same batches, and every replica its own.

    Args:
      models: the networks by name.
      pixel_scale: what a stored pixel is multiplied by.
      states: as `map_networks` takes them.
      images: (examples, inputs), uint8: all of the training set.
      labels: (examples,), int32.
      indices: (steps, replicas, batch), int32: this device's share of each batch.
      optimiser: as for `train_step`.
      average_statistics: as for `train_step`.

    Returns:
      New states, and each network's losses, (steps, replicas).
    """
    one_step = functools.partial(
        train_step, optimiser=optimiser, average_statistics=average_statistics
    )

    def step(
        states: dict[str, TrainState], index: jax.Array
    ) -> tuple[dict[str, TrainState], dict[str, jax.Array]]:
        batch = take_batch(images, labels, index, pixel_scale)
        results = map_networks(one_step, models, states, batch)
        new_states = {name: state for name, (state, _) in results.items()}
        return new_states, {name: loss for name, (_, loss) in results.items()}

    return jax.lax.scan(step, dict(states), indices)


def take_batch(
    images: jax.Array, labels: jax.Array, index: jax.Array, pixel_scale: float
) -> Batch:
    """Gathers examples by index, of any shape, as network inputs."""
    return Batch(images[index].astype(jnp.float32) * pixel_scale, labels[index])
