"""A trained network as a program that needs no code of ours, by `jax.export`."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.export
import jax.numpy as jnp

from bn_jax.linen_folding import apply_folded
from experiments.checkpoints.folded_network import fold
from experiments.checkpoints.model import one_replica, probabilities
from experiments.checkpoints.networks import rebuild

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def serialise(
    config: Mapping[str, Any],
    variables: Mapping[str, Any],
    replica: int,
    folded: bool,
) -> bytes:
    """The function from images to class probabilities, with the arrays in it.

    It takes uint8 (batch, *shape of one input), of a batch of any size, on any of
    `PLATFORMS`.

    Args:
      config: of the run, as the checkpoint has it.
      variables: collections, as of `load_variables`.
      replica: which one, of networks that were trained side by side.
      folded: fold normalisations, and say where.

    Raises:
      CheckpointError: the configuration is of no experiment here, or there is no such
        replica.
    """
    rebuilt = rebuild(config, variables["params"])
    chosen = one_replica(rebuilt, variables, replica)
    apply: Any = rebuilt.network.apply
    if folded and chosen["batch_stats"]:
        chosen = fold(rebuilt, chosen, report=True)
        apply = functools.partial(apply_folded, rebuilt.network)
    function = functools.partial(probabilities, apply, rebuilt.inputs, chosen)
    (batch,) = jax.export.symbolic_shape("batch")
    pixels = jax.ShapeDtypeStruct((batch, *rebuilt.inputs.shape), jnp.uint8)
    exported = jax.export.export(jax.jit(function), platforms=PLATFORMS)(pixels)
    return bytes(exported.serialize())
