"""Networks of checkpoints, built again from their configuration and folded."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bn_jax.linen_folding import fold_batch_norms
from experiments.checkpoints.networks import Rebuilt, rebuild
from experiments.inception.network import Inception


def fold_variables(
    config: Mapping[str, Any],
    network: str,
    variables: Mapping[str, Any],
    inception: type[nn.Module] = Inception,
) -> dict[str, Any]:
    """Folds each normalisation into the layer before it, and says where.

    Args:
      config: of the run, as the checkpoint has it.
      network: its name there.
      variables: collections, as of `load_variables`.
      inception: the class of section 4.2's network.

    Returns:
      Collections as `bn_jax.linen_folding.fold_batch_norms` makes them.

    Raises:
      CheckpointError: the configuration is of no experiment here, or there is nothing
        to fold.
    """
    if not variables["batch_stats"]:
        print(f"{network}: there is no batch normalisation to fold.")
        return dict(variables)
    rebuilt = rebuild(config, variables["params"], inception)
    if rebuilt.replicas is None:
        return fold(rebuilt, variables, report=True)
    folded = [
        fold(
            rebuilt,
            jax.tree.map(lambda leaf, i=replica: leaf[i], variables),
            report=replica == 0,
        )
        for replica in range(rebuilt.replicas)
    ]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *folded)


def fold(
    rebuilt: Rebuilt, variables: Mapping[str, Any], report: bool
) -> dict[str, Any]:
    """Folds one network, without an axis of replicas."""
    inputs = jax.ShapeDtypeStruct((1, *rebuilt.inputs.shape), jnp.float32)
    folded = fold_batch_norms(rebuilt.network, variables, inputs, train=False)
    if report:
        print(*folded.report, sep="\n")
    return folded.variables
