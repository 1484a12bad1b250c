"""Trained parameters and statistics, for other purposes than going on with a run.

What is loaded is plain: dicts of NumPy arrays, on no device, for any number of them.

    from experiments.checkpoints.load import load_variables
    variables = load_variables("runs/inception/checkpoints", step="best")
    logits = model.apply(variables, images, train=False)
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.checkpoints.folders import NEWEST, choose_checkpoint
from experiments.checkpoints.stored import (
    CheckpointError,
    damage_named,
    listing,
    mismatches,
    named_leaves,
    read_arrays,
    read_metadata,
    record_of,
)

VARIABLE_ITEMS = ("params", "batch_stats")


def load_variables(
    folder: str | Path, *, step: int | str = NEWEST, network: str | None = None
) -> dict[str, Any]:
    """Parameters and statistics of a trained network, without building it.

    For training with another optimiser, put them into a fresh state:
    `state._replace(**load_variables(folder))`.

    Args:
      folder: of a run's checkpoints, as "runs/inception/checkpoints" (statistics are
        moving averages) or "runs/inception/population" (Algorithm 2's); or that of one
        checkpoint.
      step: "newest", "best", or a number of steps.
      network: which, where a checkpoint holds several.

    Returns:
      The Flax collections `params` and `batch_stats`, nested dicts of NumPy arrays
      with the shapes and dtypes that they were saved with. `batch_stats` is empty for
      a network without batch normalisation.

    Raises:
      CheckpointError: there is no such checkpoint or network, or it is damaged.
    """
    checkpoint = choose_checkpoint(Path(folder), step)
    with damage_named(checkpoint):
        metadata = read_metadata(checkpoint)
        arrays = read_arrays(checkpoint, metadata, VARIABLE_ITEMS)
    if network is None and len(metadata.networks) == 1:
        (network,) = metadata.networks
    if network not in metadata.networks:
        raise CheckpointError(
            f"{checkpoint} holds no network {network}: expected one of "
            f"{', '.join(metadata.networks)}."
        )
    return {item: subtree(arrays, (item, network)) for item in VARIABLE_ITEMS}


class Adapted(NamedTuple):
    """Variables for another network, and what did not come from the checkpoint."""

    variables: dict[str, Any]
    reinitialised: tuple[str, ...]  # names of leaves, as "params/classifier/kernel"


def adapt(
    loaded: Mapping[str, Any],
    fresh: Mapping[str, Any],
    reinitialise: Collection[str] = (),
) -> Adapted:
    """Fits loaded variables to a network that is partly another one.

    As for another number of classes: `adapt(loaded, fresh, ["classifier"])`. Prints
    what stays as it is in `fresh`.

    Args:
      loaded: collections, as of `load_variables`.
      fresh: of the new network, initialised.
      reinitialise: names of modules whose leaves are those of `fresh`, wherever in the
        network they are.

    Returns:
      Variables with the structure of `fresh`.

    Raises:
      CheckpointError: leaves outside of these modules differ; all are listed.
    """
    records = {
        name: record_of(np.asarray(leaf)) for name, leaf in named_leaves(loaded).items()
    }
    targets = named_leaves(fresh)
    names = records.keys() | targets.keys()
    apart = {name for name in names if set(name.split("/")) & set(reinitialise)}
    lines = mismatches(
        {name: record for name, record in records.items() if name not in apart},
        {name: leaf for name, leaf in targets.items() if name not in apart},
    )
    if lines:
        raise CheckpointError(
            f"the checkpoint is of another network: {listing(lines, 20)}. Name the "
            "modules that are to be initialised anew."
        )
    reinitialised = tuple(sorted(apart & targets.keys()))
    if reinitialised:
        print(f"Initialised anew: {', '.join(reinitialised)}.")
    values = targets | {
        name: leaf for name, leaf in named_leaves(loaded).items() if name not in apart
    }
    return Adapted(
        {collection: subtree(values, (collection,)) for collection in fresh},
        reinitialised,
    )


def subtree(arrays: Mapping[str, Any], prefix: tuple[str, ...]) -> dict[str, Any]:
    """What lies below a prefix, as nested dicts."""
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        path = tuple(name.split("/"))
        if path[: len(prefix)] == prefix:
            *parents, last = path[len(prefix) :]
            place = tree
            for parent in parents:
                place = place.setdefault(parent, {})
            place[last] = array
    return tree
