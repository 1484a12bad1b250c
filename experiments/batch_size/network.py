"""A small convolutional network as pure functions, with any normalisation.

Each convolution has a stride as large as its kernel, so that it is a matrix product
over patches: many such networks train side by side on a CPU, under `jax.vmap`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

import bn_jax
from bn_jax import BatchNormParams, BatchStats

PATCH_SIZES = (4, 2, 2)  # of the layers: 32 x 32 pixels become 8 x 8, 4 x 4, 2 x 2


class Layer(NamedTuple):
    """A convolution without a bias, and the normalisation after it."""

    kernel: jax.Array  # (patch height * patch width * inputs, features)
    norm: BatchNormParams


class Network(NamedTuple):
    """Learned parameters."""

    layers: tuple[Layer, ...]
    kernel: jax.Array  # of the classifier
    bias: jax.Array


class Mode(NamedTuple):
    """What a normalisation has to know beside its input."""

    train: bool
    decay: float  # of the moving averages
    epsilon: float
    virtual_batch_size: int
    groups: int
    r_max: jax.Array
    d_max: jax.Array


Normalisation = Callable[
    [BatchNormParams, BatchStats, jax.Array, Mode], tuple[jax.Array, BatchStats]
]


def _batch_norm(
    params: BatchNormParams, stats: BatchStats, x: jax.Array, mode: Mode
) -> tuple[jax.Array, BatchStats]:
    return bn_jax.batch_norm(
        params, stats, x, train=mode.train, decay=mode.decay, eps=mode.epsilon
    )


def _ghost(
    params: BatchNormParams, stats: BatchStats, x: jax.Array, mode: Mode
) -> tuple[jax.Array, BatchStats]:
    return bn_jax.ghost_batch_norm(
        params,
        stats,
        x,
        train=mode.train,
        virtual_batch_size=min(mode.virtual_batch_size, len(x)),
        decay=mode.decay,
        eps=mode.epsilon,
    )


def _renorm(
    params: BatchNormParams, stats: BatchStats, x: jax.Array, mode: Mode
) -> tuple[jax.Array, BatchStats]:
    return bn_jax.batch_renorm(
        params,
        stats,
        x,
        train=mode.train,
        r_max=mode.r_max,
        d_max=mode.d_max,
        decay=mode.decay,
        eps=mode.epsilon,
    )


def _by_example(make: Callable[[Mode], nn.Module]) -> Normalisation:
    """One of Flax's, which keep no statistics."""

    def normalise(
        params: BatchNormParams, stats: BatchStats, x: jax.Array, mode: Mode
    ) -> tuple[jax.Array, BatchStats]:
        y: Any = make(mode).apply({"params": params._asdict()}, x)
        return y, stats

    return normalise


NORMALISATIONS: Mapping[str, Normalisation] = {
    "batch_norm": _batch_norm,
    "ghost": _ghost,
    "renorm": _renorm,
    # Over all positions and channels, as Ba et al. have it; Flax's default is each
    # position by itself.
    "layer_norm": _by_example(
        lambda mode: nn.LayerNorm(epsilon=mode.epsilon, reduction_axes=(1, 2, 3))
    ),
    "group_norm": _by_example(
        lambda mode: nn.GroupNorm(mode.groups, epsilon=mode.epsilon)
    ),
    "instance_norm": _by_example(lambda mode: nn.InstanceNorm(epsilon=mode.epsilon)),
}


def init_network(
    key: jax.Array, widths: Sequence[int], num_classes: int
) -> tuple[Network, tuple[BatchStats, ...]]:
    """Parameters, with He's initial weights, and statistics.

    Args:
      key: a random key.
      widths: features of the layers.
      num_classes: outputs.
    """
    init = nn.initializers.he_normal()
    *layer_keys, last_key = jax.random.split(key, len(widths) + 1)
    layers, inputs = [], 1
    for layer_key, patch, width in zip(layer_keys, PATCH_SIZES, widths, strict=True):
        kernel = init(layer_key, (patch * patch * inputs, width))
        layers.append(Layer(kernel, bn_jax.init_params(width)))
        inputs = width
    network = Network(
        tuple(layers),
        nn.initializers.lecun_normal()(last_key, (inputs, num_classes)),
        jnp.zeros(num_classes),
    )
    return network, tuple(bn_jax.init_stats(width) for width in widths)


def apply_network(
    network: Network,
    stats: Sequence[BatchStats],
    images: jax.Array,
    normalise: Normalisation,
    mode: Mode,
) -> tuple[jax.Array, tuple[BatchStats, ...]]:
    """Computes the logits.

    Args:
      network: the parameters.
      stats: of each layer.
      images: (batch, 32, 32, 1), from 0 to 1.
      normalise: one of `NORMALISATIONS`.
      mode: what it has to know.

    Returns:
      Logits, (batch, classes), and new statistics.
    """
    x, new_stats = images, []
    for layer, patch, old in zip(network.layers, PATCH_SIZES, stats, strict=True):
        x = _patches(x, patch) @ layer.kernel
        x, new = normalise(layer.norm, old, x, mode)
        new_stats.append(new)
        x = jax.nn.relu(x)
    return x.mean((1, 2)) @ network.kernel + network.bias, tuple(new_stats)


def _patches(x: jax.Array, size: int) -> Any:
    """(batch, height, width, channels) -> (batch, rows, columns, patch's values)."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // size, size, width // size, size, channels)
    x = x.transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, height // size, width // size, size * size * channels)
