"""The Inception network that a configuration describes."""

import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

import bn_jax.linen
from experiments.distributed import parallel
from experiments.inception.config import CONVENTIONS, NETWORK, START
from experiments.inception.initialisation import Initialisation
from experiments.inception.network import Inception


def make_model(
    config: Mapping[str, Any],
    num_classes: int,
    network: Any = Inception,
) -> Any:
    """The network that a configuration describes; the same object for equal ones.

    Args:
      config: as `experiments.inception.config.FIELDS` describes it.
      num_classes: of the data.
      network: the class to make, with `Inception`'s attributes.
    """
    # Of a run from before there were such keys.
    conventions = {key: field.default for key, field in CONVENTIONS.items()}
    keys = (*NETWORK, *CONVENTIONS, *START)
    chosen = {key: {**conventions, **config}[key] for key in keys}
    for key in ("per_activation_rows", "input_shift"):
        chosen[key] = tuple(chosen[key])
    # Groups of devices depend on how many there are.
    axes = tuple(parallel.moments_axes(config["moments"]).items())
    return _make_model(network, num_classes, axes=axes, **chosen)


@functools.lru_cache
def _make_model(network: Any, num_classes: int, **config: Any) -> Any:
    norm = functools.partial(
        bn_jax.linen.BatchNorm,
        momentum=config["decay"],
        epsilon=config["epsilon"],
        **dict(config["axes"]),
    )
    return network(
        num_classes=num_classes,
        norm=norm if config["batch_norm"] else None,
        activation=config["activation"],
        dropout_rate=config["dropout_rate"],
        local_response_norm=config["local_response_norm"],
        width=config["width"],
        pool_projection=config["pool_projection"],
        separable_stem=config["separable_stem"],
        padding=config["padding"],
        input_shift=config["input_shift"],
        per_activation_rows=config["per_activation_rows"],
        auxiliary_head=config["auxiliary_head"],
        initialisation=Initialisation(
            config["initialisation"],
            config["initial_std"],
            config["initial_scale"],
            config["width"],
        ),
        dtype=jnp.dtype(config["dtype"]),
    )
