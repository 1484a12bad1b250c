"""The Inception network that a configuration describes."""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

import bn_jax.linen
from experiments.configs.checks import ConfigError
from experiments.distributed import parallel
from experiments.models.inception import Inception

INITIALISATIONS = ("gaussian", "he")
# What the network depends on, beside the rows with statistics per activation.
MODEL_KEYS = (
    *("batch_norm", "activation", "dropout_rate", "local_response_norm", "width"),
    *("pool_projection", "separable_stem", "auxiliary_head", "epsilon", "decay"),
    *("initialisation", "initial_std", "initial_scale", "dtype"),
)


def make_model(config: Mapping[str, Any], num_classes: int) -> Inception:
    """The network that a configuration describes; the same object for equal ones."""
    keys = {key: config[key] for key in MODEL_KEYS}
    rows = tuple(config["per_activation_rows"])
    # Groups of devices depend on how many there are.
    axes = tuple(parallel.moments_axes(config["moments"]).items())
    return _make_model(num_classes, **keys, per_activation_rows=rows, axes=axes)


@functools.lru_cache
def _make_model(num_classes: int, **config: Any) -> Inception:
    norm = functools.partial(
        bn_jax.linen.BatchNorm,
        momentum=config["decay"],
        epsilon=config["epsilon"],
        **dict(config["axes"]),
    )
    return Inception(
        num_classes=num_classes,
        norm=norm if config["batch_norm"] else None,
        activation=config["activation"],
        dropout_rate=config["dropout_rate"],
        local_response_norm=config["local_response_norm"],
        width=config["width"],
        pool_projection=config["pool_projection"],
        separable_stem=config["separable_stem"],
        per_activation_rows=config["per_activation_rows"],
        auxiliary_head=config["auxiliary_head"],
        kernel_init=_initialiser(config),
        dtype=jnp.dtype(config["dtype"]),
    )


def _initialiser(config: Mapping[str, Any]) -> nn.initializers.Initializer:
    scale = config["initial_scale"]
    if config["initialisation"] == "he":
        return nn.initializers.variance_scaling(2 * scale**2, "fan_in", "normal")
    if config["initialisation"] == "gaussian":
        return nn.initializers.normal(config["initial_std"] * scale)
    raise ConfigError(
        f"--config.initialisation={config['initialisation']}: expected one of "
        f"{', '.join(INITIALISATIONS)}."
    )
