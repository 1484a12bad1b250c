"""Networks of checkpoints, built again from their configuration and folded."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bn_jax.linen_folding import fold_batch_norms
from experiments.checkpoints.stored import CheckpointError
from experiments.inception.construction import make_model
from experiments.inception.network import Inception
from experiments.mnist.network import MLP


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
    if "hidden" in config:
        return _fold_replicas(config, variables)
    if "variant" not in config:
        raise CheckpointError(
            "the checkpoint has the configuration of no experiment here: export it "
            "without --fold."
        )
    classes = variables["params"]["classifier"]["bias"].shape[-1]
    size = config["image_size"]
    return _fold(
        make_model(config, classes, inception),
        variables,
        (1, size, size, 3),
        report=True,
    )


def _fold_replicas(
    config: Mapping[str, Any], variables: Mapping[str, Any]
) -> dict[str, Any]:
    """Networks of the MNIST experiment, which trains several side by side."""
    params = variables["params"]
    replicas, inputs, _ = params["Dense_0"]["kernel"].shape
    model = MLP(
        hidden=tuple(config["hidden"]),
        num_classes=params[f"Dense_{len(config['hidden'])}"]["bias"].shape[-1],
        epsilon=config["epsilon"],
    )
    folded = [
        _fold(
            model,
            jax.tree.map(lambda leaf, i=replica: leaf[i], variables),
            (1, inputs),
            report=replica == 0,
        )
        for replica in range(replicas)
    ]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *folded)


def _fold(
    model: nn.Module,
    variables: Mapping[str, Any],
    input_shape: tuple[int, ...],
    report: bool,
) -> dict[str, Any]:
    inputs = jax.ShapeDtypeStruct(input_shape, jnp.float32)
    folded = fold_batch_norms(model, variables, inputs, train=False)
    if report:
        print(*folded.report, sep="\n")
    return folded.variables
