"""MNIST as sequences, in order and permuted, with and without batch normalisation.

    python -m experiments.sequential_mnist
    python -m experiments.sequential_mnist --config=pixels

The first reads rows of 28 pixels, and takes minutes on two cores; the second pixel by
pixel, as Cooijmans et al. 2016, which wants a GPU. docs/recurrent.md has what came out.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from experiments.configuration.fields import (
    Configuration,
    Field,
    at_least,
    positive,
    share,
)
from experiments.configuration.shared import launching, population_batches, several

# By name: whether the LSTM is normalised, and whether pixels are permuted.
NETWORKS = {
    "lstm": (False, False),
    "bn_lstm": (True, False),
    "permuted_lstm": (False, True),
    "permuted_bn_lstm": (True, True),
}

# What the paper leaves open is as in its authors' code: weights, RMSProp's decay, the
# limit of the gradient's norm.
FIELDS = {
    "dataset": Field("mnist", "tensorflow-datasets name; mnist is in the package"),
    "binarise": Field(False, "pixels become 0 or 1 instead of shades from 0 to 1"),
    "networks": Field(tuple(NETWORKS), "to train", choices=tuple(NETWORKS)),
    "pixels_per_step": Field(
        28, "of a time step; 28: a row, 1: the paper's", at_least(1)
    ),
    "units": Field(100, "of the LSTM", at_least(1)),
    "num_steps": Field(1_800, "training steps", at_least(1)),
    "batch_size": Field(64, "examples a step, over all devices", at_least(2)),
    **several(3, "initial weights and in the data's order"),
    "permutation_seed": Field(0, "of the order of permuted pixels", at_least(0)),
    "learning_rate": Field(3e-3, "of RMSProp", positive()),
    "rms_decay": Field(0.9, "of RMSProp's mean of squares", share()),
    "gradient_norm": Field(1.0, "that longer gradients are cut to", positive()),
    "initial_scale": Field(0.1, "of the normalised terms", positive()),
    "initial_noise": Field(
        0.1, "standard deviation of the first hidden state", share()
    ),
    "forget_bias": Field(1.0, "of the forget gate, initially"),
    "epsilon": Field(1e-5, "added to the variance", positive()),
    # As short as a run is, networks change within tens of steps.
    "decay": Field(0.9, "of the moving average of batch statistics", share()),
    "population_batches": population_batches(),
    "eval_every": Field(200, "steps between evaluations on the test set", at_least(1)),
    **launching(checkpoint_every=600),
}

# Pixel by pixel: 100 epochs of 50,000 images or so, as long as the authors' code.
PIXELS: Mapping[str, Any] = {
    "pixels_per_step": 1,
    "num_steps": 80_000,
    "num_seeds": 1,
    "learning_rate": 1e-3,
    "decay": 0.99,
    "eval_every": 1_000,
    "checkpoint_every": 1_000,
}

CONFIGURATION = Configuration(FIELDS, variants={"pixels": PIXELS})


def get_config(variant: str = "") -> ConfigDict:
    """The configuration, by the word after the file's name and a colon."""
    return ConfigDict(CONFIGURATION.values(variant))
