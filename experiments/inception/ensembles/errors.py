"""The errors of trained networks and of their ensemble: section 4.2.3 of the paper."""

import contextlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from experiments.data.errors import DataError
from experiments.distributed.progress import progress_bar
from experiments.inception.data import Data
from experiments.inception.ensembles.trained_networks import Network
from experiments.inception.scores import Scores, score

ENSEMBLE = "ensemble"

_score = jax.jit(score)


def evaluate(
    networks: Sequence[Network],
    data: Data,
    crops: Sequence[int],
    num_examples: int = 0,
) -> dict[str, Any]:
    """Measures every network and, if there are several, all of them together.

    A prediction is the arithmetic mean of the class probabilities over crops, and that
    of an ensemble over its networks too.

    Args:
      networks: of `trained_networks.load_networks`; at least one.
      data: what they were trained with.
      crops: at least one number of crops that `experiments.data.crops` knows.
      num_examples: how many of the first test examples to take; 0: all.

    Returns:
      JSON values: the test set, the networks, and the rows of figure 4, with errors in
      percent. A row's crops are those that were used: half of 10 and 144 where images
      must not be mirrored.

    Raises:
      DataError: no image can be decoded, or too many cannot, or files are damaged.
    """
    config = networks[0].config
    members = [(network.name, 1) for network in networks]
    if len(networks) > 1:
        members.append((ENSEMBLE, len(networks)))
    examples = min(num_examples or len(data.test), len(data.test))
    decoded = 0
    rows = []
    for asked in crops:
        used, scores = _measure(networks, data, asked, examples)
        decoded = int(scores[0].count)
        for (name, models), found in zip(members, scores, strict=True):
            rows.append(
                {
                    "model": name,
                    "resolution": config["image_size"],
                    "crops": used,
                    "models": models,
                    "top1_error": 100 - 100 * found.top1 / found.count,
                    "top5_error": 100 - 100 * found.top5 / found.count,
                }
            )
    return {
        "test_set": {
            "dataset": config["dataset"],
            "classes": data.test.num_classes,
            "examples": len(data.test),
            "evaluated": decoded,
            "undecodable": examples - decoded,
            "crop_fraction": config["crop_fraction"],
            "flip": config["flip"],
        },
        "networks": [
            {
                "name": network.name,
                "folder": str(network.folder),
                "seed": network.config["seed"],
                "step": network.step,
                "num_steps": network.config["num_steps"],
                "statistics": network.statistics,
            }
            for network in networks
        ],
        "rows": rows,
    }


def _measure(
    networks: Sequence[Network], data: Data, crops: int, examples: int
) -> tuple[int, list[Scores]]:
    """How many crops there are, and the scores of each network and the ensemble."""
    several = len(networks) > 1
    totals = np.zeros((len(networks) + several, len(Scores._fields)))
    with (
        contextlib.closing(data.testing(examples, crops)) as batches,
        progress_bar(examples, 0, "image") as bar,
    ):
        name = f"{crops} crop{'s' * (crops > 1)}"
        bar.set_description(name, refresh=False)
        for batch in batches:
            found = [
                network.experiment.probabilities(network.state, batch.images)
                for network in networks
            ]
            if several:
                found.append(np.mean(found, axis=0))
            totals += [
                jax.device_get(_score(probabilities, batch.labels, batch.mask))
                for probabilities in found
            ]
            used = batch.images.shape[1]
            bar.update(int(batch.mask.sum()))
    if not totals.any():
        raise DataError(
            f"none of the first {examples:,} test images can be decoded; restore the "
            "data."
        )
    return used, [Scores(*total) for total in totals.tolist()]
