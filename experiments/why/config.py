"""Why batch normalisation helps: seven measurements with and without it.

    python -m experiments.why
    python -m experiments.why --config.parts=landscape --config.learning_rates=0.1,3.0

docs/why.md has the time it takes and what came out.
"""

from ml_collections import ConfigDict

from experiments.configuration.fields import (
    Configuration,
    Field,
    Role,
    at_least,
    positive,
    share,
)
from experiments.configuration.shared import several

PARTS = ("landscape", "shift", "jacobians", "outside", "depth", "order", "dropout")
NETWORKS = ("mnist", "inception")
ACTIVATIONS = ("sigmoid", "relu")

FIELDS = {
    # Others may be added to a folder later.
    "parts": Field(PARTS, "what to measure", choices=PARTS, role=Role.LAUNCH),
    "dataset": Field("mnist", "tensorflow-datasets name; mnist is in the package"),
    **several(
        3, "initial weights and in the data's order; depth and Inception take the first"
    ),
    # The network of section 4.1, which all parts but depth train.
    "hidden": Field((100, 100, 100), "units of the hidden layers", at_least(1)),
    "batch_size": Field(60, "examples a step", at_least(2)),
    "initial_std": Field(
        0.1, "standard deviation of the Gaussian initial weights", positive()
    ),
    "epsilon": Field(1e-3, "added to the variance", positive()),
    "decay": Field(0.99, "of the moving average of batch statistics", share()),
    "num_looks": Field(
        20, "measurements on the way, beside that at step 0", at_least(1)
    ),
    "probe_examples": Field(
        500, "training examples that are measured on, as one batch", at_least(2)
    ),
    # landscape, shift, jacobians: plain SGD at each of these rates.
    "learning_rates": Field(
        (0.1, 1.0), "of landscape, shift and jacobians", positive()
    ),
    "num_steps": Field(2_000, "training steps of these three", at_least(1)),
    "step_factors": Field(
        (0.5, 1.0, 2.0, 4.0),
        "how far landscape looks along the gradient, in learning rates",
        positive(),
    ),
    "networks": Field(
        NETWORKS,
        "what landscape and shift are measured on",
        choices=NETWORKS,
        role=Role.LAUNCH,
    ),
    "inception_width": Field(
        1 / 16, "of Inception, as a share of the paper's channels", positive()
    ),
    "inception_examples": Field(
        512, "images composed of digits that it trains on", at_least(2)
    ),
    "inception_batch_size": Field(
        32, "examples of its step, and of a measurement", at_least(2)
    ),
    "inception_rate": Field(0.05, "its learning rate", positive()),
    "inception_steps": Field(40, "its training steps", at_least(1)),
    "inception_looks": Field(4, "its measurements, beside that at step 0", at_least(1)),
    # outside: normalising outside the gradient.
    "outside_rate": Field(0.1, "learning rate of outside", positive()),
    "outside_steps": Field(1_000, "training steps of outside", at_least(1)),
    # depth: what trains, of networks of one width.
    "depths": Field((3, 10, 30, 100), "hidden layers", at_least(2)),
    "depth_activations": Field(ACTIVATIONS, "nonlinearities", choices=ACTIVATIONS),
    "depth_stds": Field(
        (0.25, 0.5, 1.0, 1.41, 2.0, 4.0),
        "standard deviations of initial weights, in 1 / sqrt(a layer's inputs)",
        positive(),
    ),
    "depth_rates": Field(
        (0.01, 0.1), "learning rates of depth; the better counts", positive()
    ),
    # Of few steps the moving averages are to forget where they began.
    "depth_decay": Field(0.9, "in place of decay, in depth", share()),
    "depth_width": Field(32, "units of each layer", at_least(1)),
    "depth_steps": Field(200, "training steps of depth", at_least(1)),
    # order: before or after the nonlinearity.
    "order_activations": Field(ACTIVATIONS, "nonlinearities", choices=ACTIVATIONS),
    "order_rates": Field(
        (0.03, 0.1, 0.3, 1.0, 3.0), "learning rates of order", positive()
    ),
    "order_steps": Field(2_000, "training steps of order", at_least(1)),
    # dropout: few examples, so that there is something to regularise.
    "dropouts": Field(
        (0.0, 0.1, 0.2, 0.3, 0.4), "shares of units that are left out", share()
    ),
    "dropout_examples": Field(5_000, "training examples of dropout", at_least(2)),
    "dropout_learning_rate": Field(0.3, "learning rate of dropout", positive()),
    "dropout_steps": Field(3_000, "training steps of dropout", at_least(1)),
}


CONFIGURATION = Configuration(FIELDS)


def get_config(variant: str = "") -> ConfigDict:
    """The configuration."""
    return ConfigDict(CONFIGURATION.values(variant))
