"""What a trained network is worth: accuracy, statistics and distributions."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import bn_jax
from experiments.distributed.parallel import DEVICE_AXIS
from experiments.training.state import TrainState
from experiments.training.steps import map_networks, take_batch

PERCENTILES = (15, 50, 85)  # of a sigmoid's input: those of the paper's figure 1


def count_correct(
    models: Mapping[str, nn.Module],
    pixel_scale: float,
    states: Mapping[str, TrainState],
    images: jax.Array,
    labels: jax.Array,
    mask: jax.Array,
) -> dict[str, jax.Array]:
    """Counts right answers at inference, over all devices.

    Args:
      models: the networks by name.
      pixel_scale: what a stored pixel is multiplied by.
      states: as `map_networks` takes them.
      images: (examples, inputs), uint8: this device's share.
      labels: (examples,), int32.
      mask: (examples,), bool: False for padding.

    Returns:
      For each network (replicas,), int32.
    """
    inputs = images.astype(jnp.float32) * pixel_scale

    def correct(model: nn.Module, state: TrainState) -> jax.Array:
        logits: Any = model.apply(state.variables, inputs, train=False)
        hits = (jnp.argmax(logits, axis=-1) == labels) & mask
        return jax.lax.psum(jnp.sum(hits, dtype=jnp.int32), DEVICE_AXIS)

    return map_networks(correct, models, states)


def pad_and_mask(
    images: np.ndarray, labels: np.ndarray, multiple: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pads a data set to a multiple of the devices, so that no example is left out.

    Returns:
      Images, labels and the mask that is False for padding.
    """
    padding = -len(images) % multiple
    return (
        np.pad(images, [(0, padding), (0, 0)]),
        np.pad(labels, (0, padding)),
        np.arange(len(images) + padding) < len(images),
    )


def population_statistics(
    models: Mapping[str, nn.Module],
    pixel_scale: float,
    states: Mapping[str, TrainState],
    images: jax.Array,
    labels: jax.Array,
    indices: jax.Array,
    *,
    average_statistics: bool = False,
) -> dict[str, Any]:
    """Population statistics as the paper's Algorithm 2 has them.

    As `bn_jax.population_statistics`, in one compiled loop.

    Args:
      models: the networks by name.
      pixel_scale: what a stored pixel is multiplied by.
      states: as `map_networks` takes them.
      images: (examples, inputs), uint8: all of the training set.
      labels: (examples,), int32.
      indices: (batches, replicas, batch), int32: this device's share of each batch.
      average_statistics: take the mean over devices, where they do not share moments.

    Returns:
      For each network a collection `batch_stats`, with the leading axis (replicas).
    """

    def add(gathered: dict[str, Any], index: jax.Array) -> tuple[dict[str, Any], None]:
        batch = take_batch(images, labels, index, pixel_scale)
        gathering = {
            name: states[name]._replace(batch_stats=gathered[name]) for name in models
        }
        return map_networks(add_batch, models, gathering, batch.inputs), None

    old = {name: states[name].batch_stats for name in models}
    gathered, _ = jax.lax.scan(add, bn_jax.population.init(old), indices)
    statistics = bn_jax.population.finalize(gathered, old)
    if average_statistics:
        return jax.lax.pmean(statistics, DEVICE_AXIS)
    return statistics


def add_batch(model: nn.Module, state: TrainState, inputs: jax.Array) -> Any:
    """Adds a batch to the statistics, with every layer normalising by its own batch.

    Args:
      model: the network.
      state: of the network, with the statistics of `bn_jax.population.init`.
      inputs: (examples, ...), this device's share.

    Returns:
      The collection `batch_stats` with the batch.
    """
    _, updated = model.apply(
        state.variables, inputs, train=True, mutable=["batch_stats"]
    )
    return updated.get("batch_stats", {})


def sigmoid_inputs(
    models: Mapping[str, nn.Module],
    pixel_scale: float,
    states: Mapping[str, TrainState],
    images: jax.Array,
) -> dict[str, jax.Array]:
    """What the last hidden layer's sigmoids receive in the training network.

    Runs on whole arrays, outside any map over devices.

    Args:
      models: the networks by name.
      pixel_scale: what a stored pixel is multiplied by.
      states: as `map_networks` takes them.
      images: (examples, inputs), uint8: they normalise as one batch.

    Returns:
      For each network (replicas, examples, units), float32.
    """
    inputs = images.astype(jnp.float32) * pixel_scale

    def probe(model: nn.Module, state: TrainState) -> jax.Array:
        collections = ["intermediates", "batch_stats"]
        alone = model.clone(axis_name=None, axis_index_groups=None)
        _, seen = alone.apply(state.variables, inputs, train=True, mutable=collections)
        (values,) = seen["intermediates"]["sigmoid_input"]
        return values

    return map_networks(probe, models, states)
