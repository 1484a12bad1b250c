"""Accuracy against batch size, for batch normalisation and what is said to replace it.

    python -m experiments.batch_size
    python -m experiments.batch_size --config.batch_sizes=2,32,512 --config.num_seeds=1

docs/small_batches.md has the time it takes and what came out.
"""

from typing import Any

from ml_collections import ConfigDict

# Key: default, and what it means.
KEYS: dict[str, tuple[Any, str]] = {
    "dataset": ("mnist", "tensorflow-datasets name; mnist comes with the package"),
    "methods": (
        (
            *("batch_norm", "ghost", "renorm"),
            *("layer_norm", "group_norm", "instance_norm"),
        ),
        "what normalises",
    ),
    "batch_sizes": ((2, 4, 8, 32, 128, 512), "examples a step"),
    "orders": (
        ("shuffled", "skewed"),
        "shuffled: batches of all classes; skewed: each of a few",
    ),
    "skewed_classes": (2, "classes of a skewed batch"),
    # The same for every batch size: small batches take more steps with them.
    "num_examples": (25_600, "examples that a run sees; a multiple of all batch sizes"),
    "num_seeds": (2, "runs that differ in initial weights and in the data's order"),
    "first_seed": (0, "seeds are first_seed, first_seed + 1, ..."),
    # Each method has its own best rate at each size, chosen on validation images.
    "learning_rates": (
        (0.01, 0.03, 0.1, 0.3),
        "rates to choose from at a batch of 32; others: times sqrt(batch size / 32)",
    ),
    "momentum": (0.9, "of SGD; the rate falls to 0 in a straight line"),
    "validation_examples": (5_000, "training examples held out to choose rates"),
    "widths": ((16, 32, 32), "channels of the layers"),
    "epsilon": (1e-3, "added to the variance"),
    # 0.99 at a batch of 32; the same memory in examples at every other.
    "statistics_memory": (3_200, "examples that moving averages remember"),
    "virtual_batch_size": (16, "of ghost batches; smaller batches are not divided"),
    "r_max": (3.0, "batch renormalisation's limit for r, reached from 1"),
    "d_max": (5.0, "the same for d, reached from 0"),
    "ramp": ((0.1, 0.5), "shares of the run between which these limits loosen"),
    "groups": (4, "of group normalisation"),
}


def get_config() -> ConfigDict:
    """The configuration."""
    return ConfigDict({key: default for key, (default, _) in KEYS.items()})
