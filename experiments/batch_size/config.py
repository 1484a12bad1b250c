"""Accuracy against batch size, for batch normalisation and what is said to replace it.

    python -m experiments.batch_size
    python -m experiments.batch_size --config.batch_sizes=2,32,512 --config.num_seeds=1

docs/small_batches.md has the time it takes and what came out.
"""

from ml_collections import ConfigDict

from experiments.configuration.fields import (
    Configuration,
    Field,
    at_least,
    positive,
    share,
)
from experiments.configuration.shared import several

METHODS = (
    *("batch_norm", "ghost", "renorm"),
    *("layer_norm", "group_norm", "instance_norm"),
)
ORDERS = ("shuffled", "skewed")

FIELDS = {
    "dataset": Field("mnist", "tensorflow-datasets name; mnist is in the package"),
    "methods": Field(METHODS, "what normalises", choices=METHODS),
    "batch_sizes": Field((2, 4, 8, 32, 128, 512), "examples a step", at_least(2)),
    "orders": Field(
        ORDERS,
        "shuffled: batches of all classes; skewed: each of a few",
        choices=ORDERS,
    ),
    "skewed_classes": Field(2, "classes of a skewed batch", at_least(1)),
    # The same for every batch size: small batches take more steps with them.
    "num_examples": Field(
        25_600, "examples that a run sees; a multiple of all batch sizes", at_least(1)
    ),
    **several(2, "initial weights and in the data's order"),
    # Each method has its own best rate at each size, chosen on validation images.
    "learning_rates": Field(
        (0.01, 0.03, 0.1, 0.3),
        "rates to choose from at a batch of 32; others: times sqrt(batch size / 32)",
        positive(),
    ),
    "momentum": Field(0.9, "of SGD; the rate falls to 0 in a straight line", share()),
    "validation_examples": Field(
        5_000, "training examples held out to choose rates", at_least(1)
    ),
    "widths": Field((16, 32, 32), "channels of the layers", at_least(1)),
    "epsilon": Field(1e-3, "added to the variance", positive()),
    # 0.99 at a batch of 32; the same memory in examples at every other.
    "statistics_memory": Field(
        3_200, "examples that moving averages remember", positive()
    ),
    "virtual_batch_size": Field(
        16, "of ghost batches; smaller batches are not divided", at_least(1)
    ),
    "r_max": Field(3.0, "batch renormalisation's limit for r, reached from 1"),
    "d_max": Field(5.0, "the same for d, reached from 0"),
    "ramp": Field(
        (0.1, 0.5), "shares of the run between which these limits loosen", share()
    ),
    "groups": Field(4, "of group normalisation", at_least(1)),
}


CONFIGURATION = Configuration(FIELDS)


def get_config(variant: str = "") -> ConfigDict:
    """The configuration."""
    return ConfigDict(CONFIGURATION.values(variant))
