"""Section 4.1: a sigmoid network on MNIST, with and without batch normalisation.

    python -m experiments.mnist
    python -m experiments.mnist --config=experiments/configs/mnist.py:rates

The first draws figure 1; the second trains both networks at many learning rates and
initial weights side by side, and draws accuracy against rate. README.md has the time
each takes and the numbers to expect.
"""

from typing import Any

from ml_collections import ConfigDict

# Key: default, and what it means. The paper leaves open the learning rate, the standard
# deviation of the initial weights, eps, the moving average's decay and how the input is
# made binary; the reasons for our choices stand here.
KEYS: dict[str, tuple[Any, str]] = {
    "dataset": ("mnist", "tensorflow-datasets name; mnist comes with the package"),
    "binarise": (True, "pixels become 0 or 1 (above 127), as in the paper"),
    "hidden": ((100, 100, 100), "units of the hidden layers"),
    "num_steps": (50_000, "training steps"),
    "batch_size": (60, "examples a step, over all devices"),
    "num_seeds": (3, "runs that differ in initial weights and in the data's order"),
    "first_seed": (0, "seeds are first_seed, first_seed + 1, ..."),
    # Of the rates 0.01, 0.1 and 0.5 the one that is best for the network without batch
    # normalisation, which the comparison must be fair to.
    "learning_rate": (0.5, "step size of plain SGD"),
    # A tenth keeps sigmoids of 100 inputs in their linear range; with 0.01 the network
    # without batch normalisation does not leave chance for tens of thousands of steps.
    "initial_std": (0.1, "standard deviation of the Gaussian initial weights"),
    "epsilon": (1e-3, "added to the variance"),
    "decay": (0.99, "of the moving average of batch statistics"),
    "population_batches": (1_000, "training batches that Algorithm 2 averages over"),
    "eval_every": (500, "steps between evaluations on the test set"),
    "early_eval_every": (100, "the same in the first early_steps, where curves rise"),
    "early_steps": (2_000, "see early_eval_every"),
    "milestones": ((1_000, 10_000, 50_000), "steps to report, beside the last one"),
    "probe_examples": (2_000, "test examples for the sigmoids' percentiles; 0: none"),
    "checkpoint_every": (5_000, "steps between checkpoints"),
    # Launching: who shares the work, and how.
    "moments": ("global", "shared by all devices; local: by none; 4, say: by so many"),
    "parallelism": ("pmap", "what maps a step over devices: pmap or shard_map"),
    "dry_run": (False, "print what the run would need and take, and stop"),
}

# What changes in the sweep: one seed and fewer steps, but every rate with every
# standard deviation, in one vectorised run.
RATES: dict[str, tuple[Any, str]] = {
    "learning_rate": (
        (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0),
        "step sizes of plain SGD",
    ),
    "initial_std": ((0.01, 0.1, 1.0), "standard deviations of the initial weights"),
    "num_steps": (5_000, "training steps"),
    "num_seeds": (1, KEYS["num_seeds"][1]),
    "eval_every": (1_000, KEYS["eval_every"][1]),
    "early_steps": (0, KEYS["early_steps"][1]),
    "milestones": ((1_000,), KEYS["milestones"][1]),
    "probe_examples": (0, KEYS["probe_examples"][1]),
}

VARIANTS: dict[str, dict[str, tuple[Any, str]]] = {"": {}, "rates": RATES}


def get_config(variant: str = "") -> ConfigDict:
    """The configuration, by the word after the file's name and a colon.

    Args:
      variant: nothing for figure 1, or "rates".

    Raises:
      ValueError: there is no such variant.
    """
    if variant not in VARIANTS:
        raise ValueError(
            f"unknown variant {variant!r}; there are "
            f"{sorted(name for name in VARIANTS if name)}, or none for figure 1."
        )
    keys = KEYS | VARIANTS[variant]
    return ConfigDict({key: default for key, (default, _) in keys.items()})
