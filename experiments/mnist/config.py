"""Section 4.1: a sigmoid network on MNIST, with and without batch normalisation.

    python -m experiments.mnist
    python -m experiments.mnist --config=rates

The first draws figure 1; the second trains both networks at many learning rates and
initial weights side by side, and draws accuracy against rate. docs/results.md has the
time each takes and the numbers to expect.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from experiments.configuration.fields import (
    Configuration,
    Field,
    Role,
    at_least,
    positive,
    share,
)
from experiments.configuration.shared import launching, population_batches, several

# The paper leaves open the learning rate, the standard deviation of the initial
# weights, eps, the moving average's decay and how the input is made binary; the reasons
# for our choices stand here.
FIELDS = {
    "dataset": Field("mnist", "tensorflow-datasets name; mnist is in the package"),
    "binarise": Field(True, "pixels become 0 or 1 (above 127), as in the paper"),
    "hidden": Field((100, 100, 100), "units of the hidden layers", at_least(1)),
    "num_steps": Field(50_000, "training steps", at_least(1), role=Role.LENGTH),
    "batch_size": Field(60, "examples a step, over all devices", at_least(2)),
    **several(3, "initial weights and in the data's order"),
    # Of the rates 0.01, 0.1 and 0.5 the one that is best for the network without batch
    # normalisation, which the comparison must be fair to.
    "learning_rate": Field(0.5, "step size of plain SGD", positive()),
    # A tenth keeps sigmoids of 100 inputs in their linear range; with 0.01 the network
    # without batch normalisation does not leave chance for tens of thousands of steps.
    "initial_std": Field(
        0.1, "standard deviation of the Gaussian initial weights", positive()
    ),
    "epsilon": Field(1e-3, "added to the variance", positive()),
    "decay": Field(0.99, "of the moving average of batch statistics", share()),
    "population_batches": population_batches(),
    "eval_every": Field(500, "steps between evaluations on the test set", at_least(1)),
    "early_eval_every": Field(
        100, "the same in the first early_steps, where curves rise", at_least(1)
    ),
    "early_steps": Field(2_000, "see early_eval_every", at_least(0)),
    "milestones": Field(
        (1_000, 10_000, 50_000), "steps to report, beside the last one", at_least(1)
    ),
    "probe_examples": Field(
        2_000, "test examples for the sigmoids' percentiles; 0: none", at_least(0)
    ),
    **launching(checkpoint_every=5_000),
}

# What changes in the sweep: one seed and fewer steps, but every rate with every
# standard deviation, in one vectorised run.
RATES: Mapping[str, Any] = {
    "learning_rate": (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0),
    "initial_std": (0.01, 0.1, 1.0),
    "num_steps": 5_000,
    "num_seeds": 1,
    "eval_every": 1_000,
    "early_steps": 0,
    "milestones": (1_000,),
    "probe_examples": 0,
}

CONFIGURATION = Configuration(FIELDS, variants={"rates": RATES})


def get_config(variant: str = "") -> ConfigDict:
    """The configuration, by the word after the file's name and a colon."""
    return ConfigDict(CONFIGURATION.values(variant))
