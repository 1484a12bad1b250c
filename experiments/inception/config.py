"""Section 4.2: Inception and its batch-normalised variants.

    python -m experiments.inception --config=bn_x5 --data_dir=...
    python -m experiments.inception --config=bn_x5,small

A variant is its parent and the few lines that the paper names. The first command needs
ImageNet (docs/imagenet.md); the second trains the same network at reduced width on
cluttered MNIST, which comes with the project. docs/inception.md has the times and the
numbers to expect.
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
from experiments.configuration.shared import launching, population_batches
from experiments.data.distortions import STRENGTHS
from experiments.inception.layers import ACTIVATIONS
from experiments.inception.network import POOL_PROJECTIONS, TABLE
from experiments.training.optimisers import OPTIMISERS, SCHEDULES, named

INITIALISATIONS = ("gaussian", "he")

# What a trained network computes. The defaults are the paper's baseline, at its size.
NETWORK = {
    "batch_norm": Field(False, "normalise before every nonlinearity"),
    "activation": Field("relu", "the nonlinearity", choices=tuple(ACTIVATIONS)),
    "local_response_norm": Field(
        True, "across neighbouring channels, after conv1 and conv2"
    ),
    "per_activation_rows": Field(
        (),
        "rows whose statistics are per activation, as ('5b',)",
        choices=[row.name for row in TABLE],
    ),
    "width": Field(1.0, "what all numbers of channels are multiplied by", positive()),
    "pool_projection": Field(
        96, "reading of the paper's table for 4c and 4d", choices=POOL_PROJECTIONS
    ),
    "separable_stem": Field(True, "factor the first convolution, depth multiplier 8"),
    "auxiliary_head": Field(False, "GoogLeNet's second classifier, on row 4a"),
    # As TF-Slim's Inception has it.
    "epsilon": Field(1e-3, "added to the variance", positive()),
    "dtype": Field(
        "float32",
        "of the computation; parameters are float32",
        choices=("float32", "bfloat16"),
    ),
}

# How it starts, and what its layers do in training alone.
START = {
    "dropout_rate": Field(0.4, "before the softmax layer", share()),
    # It remembers a thousand steps, short beside millions.
    "decay": Field(0.999, "of the moving average of batch statistics", share()),
    # The paper's time drew weights from small Gaussians; it gives no deviation. This
    # one lets a signal through 23 rectified layers of the paper's widths.
    "initialisation": Field(
        "gaussian", "of the weights; he: He et al. 2015", choices=INITIALISATIONS
    ),
    "initial_std": Field(
        0.05, "standard deviation of gaussian initial weights", positive()
    ),
    "initial_scale": Field(
        1.0, "what initial weights of convolutions are multiplied by", positive()
    ),
}

TRAINING = {
    "rematerialise": Field(False, "recompute normalisations in the backward pass"),
    # Momentum, rate schedule and L2 weight are not in the paper: the first two are
    # GoogLeNet's (4% down every 8 epochs: 320,000 batches of 32), the third is that of
    # its published Caffe model. A fifth of it is what TF-Slim trains this network with.
    "batch_size": Field(32, "examples a step, over all devices", at_least(2)),
    "num_steps": Field(31_000_000, "training steps", at_least(1), role=Role.LENGTH),
    "optimiser": Field(
        "sgd",
        "Optax's, alone or with its arguments, as lars(weight_decay=1e-4)",
        named(OPTIMISERS),
    ),
    "schedule": Field(
        "staircase",
        "of the rate, alone or with its arguments, as cosine(alpha=0.01)",
        named(SCHEDULES),
    ),
    "warmup_steps": Field(0, "over which the rate rises from 0 before", at_least(0)),
    "learning_rate": Field(0.0015, "the baseline's initial step size", positive()),
    "rate_multiple": Field(1.0, "what the variant multiplies it by", positive()),
    "momentum": Field(0.9, "of sgd and lars", share()),
    "decay_factor": Field(
        0.96, "what the rate is multiplied by, in a staircase", share(positive=True)
    ),
    "steps_per_decay": Field(
        320_000, "steps between these, for the baseline", at_least(1)
    ),
    "decay_speed": Field(
        1.0, "how many times faster the variant's rate decays", positive()
    ),
    "l2_weight": Field(
        2e-4, "of the penalty on weights, half of it times their squares", share()
    ),
    "l2_multiple": Field(1.0, "what the variant multiplies it by", share()),
}

DATA = {
    "dataset": Field("imagenet2012", "tensorflow-datasets name, or cluttered_mnist"),
    "image_size": Field(224, "side of the network's input", at_least(32)),
    # Which of both it is, and so how images are augmented, the run's folder notes.
    "feed": Field(
        "auto",
        "where training images lie decoded: on the devices, or encoded in files; auto: "
        "on accelerators that they fit on",
        choices=("auto", "device", "files"),
        role=Role.LAUNCH,
    ),
    "shuffle": Field(
        "shards", "what is shuffled (across shards)", choices=("examples", "shards")
    ),
    "distortions": Field("strong", "photometric distortions", choices=tuple(STRENGTHS)),
    "min_area": Field(
        0.08,
        "of a random crop, as a share of the image; 1: no crop",
        share(positive=True),
    ),
    "flip": Field(True, "mirror half of the training images, and crops in evaluation"),
    "crop_fraction": Field(
        0.875, "of the shorter side, that a centre crop sees", share(positive=True)
    ),
    "max_undecodable": Field(
        100, "images that may turn out broken before a run stops", at_least(0)
    ),
}

MEASURING = {
    "eval_every": Field(50_000, "steps between evaluations", at_least(1)),
    "eval_examples": Field(
        0, "of the validation set, while training; 0: all", at_least(0)
    ),
    "eval_batch_size": Field(
        256, "examples a step of an evaluation, over all devices", at_least(1)
    ),
    "population_batches": population_batches(),
}

FIELDS = {
    "variant": Field(
        "inception", "name of the model in tables and figures", role=Role.NAME
    ),
    "seed": Field(
        0,
        "of the initial weights, the data's order and its augmentation",
        at_least(0),
        role=Role.SEED,
    ),
    **NETWORK,
    **START,
    **TRAINING,
    **DATA,
    **MEASURING,
    **launching(checkpoint_every=10_000),
    "workers": Field(
        -1,
        "processes that make batches; 0: a thread; -1: one a core",
        at_least(-1),
        role=Role.LAUNCH,
        formerly="threads",
    ),
}

# Section 4.2.2. Each entry: its parent, and what changes; "length" is that of the run,
# in steps of which the sizes below have their own numbers.
Changes = dict[str, Any]
VARIANTS: Mapping[str, tuple[str, Changes]] = {
    "inception": ("", {}),
    # The paper's failures, as long as the BN-x5 that they are failures beside.
    "inception_x5": ("inception", {"rate_multiple": 5.0, "length": "short"}),
    "inception_sigmoid": (
        "inception",
        {"activation": "sigmoid", "length": "short"},
    ),
    # Not the paper's: the later answer to the same problem.
    "inception_he": ("inception", {"initialisation": "he"}),
    "bn_baseline": ("inception", {"batch_norm": True}),
    "bn_x5": (
        "bn_baseline",
        {
            "rate_multiple": 5.0,
            "dropout_rate": 0.0,
            "l2_multiple": 1 / 5,
            "decay_speed": 6.0,
            "local_response_norm": False,
            "shuffle": "examples",
            "distortions": "weak",
            "length": "short",  # after which BN-x30 reached its best
        },
    ),
    "bn_x30": ("bn_x5", {"rate_multiple": 30.0}),
    "bn_x5_sigmoid": ("bn_x5", {"activation": "sigmoid"}),
    # Section 4.2.3: six networks, each with some of larger initial weights, dropout of
    # 5% or 10%, and statistics per activation in the last hidden layers.
    "ensemble_1": ("bn_x30", {"seed": 1, "initial_scale": 2.0}),
    "ensemble_2": ("bn_x30", {"seed": 2, "dropout_rate": 0.05}),
    "ensemble_3": ("bn_x30", {"seed": 3, "dropout_rate": 0.1}),
    "ensemble_4": ("bn_x30", {"seed": 4, "per_activation_rows": ("5b",)}),
    "ensemble_5": ("ensemble_1", {"seed": 5, "dropout_rate": 0.05}),
    "ensemble_6": ("ensemble_3", {"seed": 6, "per_activation_rows": ("5a", "5b")}),
}

# Sizes for the data that comes with the project. Runs are thousands of times shorter
# than the paper's, but a network needs a thousand steps to learn anything: so the rate
# falls less over a run, and those of the faster variants are less than five times as
# short as the baselines'.
LENGTHS = {  # steps by size, "" the paper's
    "whole": {"": 31_000_000, "large": 31_000, "small": 6_200},
    "short": {"": 6_000_000, "large": 12_000, "small": 2_400},
}
LARGE: Changes = {
    "steps_per_decay": 320,
    "decay_factor": 0.98,
    "dataset": "cluttered_mnist",
    "image_size": 64,
    "min_area": 1.0,
    "flip": False,
    "crop_fraction": 1.0,
    "learning_rate": 0.01,
    "decay": 0.99,
    "eval_every": 250,
    "population_batches": 200,
    "checkpoint_every": 1_000,
}
SMALL: Changes = LARGE | {
    "steps_per_decay": 64,
    "decay_factor": 0.99,
    "width": 0.125,
    "initial_std": 0.15,  # an eighth of the channels: nearly the square root of 8 more
    "decay": 0.95,
    "workers": 0,  # composing takes a fiftieth of a step's time
    "eval_every": 100,
    "eval_examples": 2_000,
    "eval_batch_size": 100,
    "population_batches": 100,
}
SIZES: dict[str, Changes] = {"small": SMALL, "large": LARGE}


def changes(variant: str) -> Changes:
    """All that a variant changes.

    Args:
      variant: a key of `VARIANTS` (default: inception); then a comma and a key of
        `SIZES`, for the data that comes with the project.

    Raises:
      ValueError: there is no such variant.
    """
    name, _, size = variant.partition(",")
    name = name or "inception"
    if name not in VARIANTS or size not in ("", *SIZES):
        raise ValueError(
            f"unknown variant {variant!r}; there are {', '.join(VARIANTS)}, each also "
            f"with one of {', '.join(',' + size for size in SIZES)} after it."
        )
    changed = _changes(name) | {"variant": name}
    length = LENGTHS[changed.pop("length", "whole")]
    return changed | {"num_steps": length[size]} | SIZES.get(size, {})


def why_as_long(config: Mapping[str, Any]) -> str:
    """Why a run cannot be made longer; empty if it can."""
    from experiments.training.optimisers import spread_over

    text = config["schedule"]
    length = spread_over(text)
    return f"schedule={text} takes {length} from num_steps" if length else ""


CONFIGURATION = Configuration(FIELDS, changes, why_as_long)


def get_config(variant: str = "") -> ConfigDict:
    """The configuration, by the words after the file's name and a colon."""
    return ConfigDict(CONFIGURATION.values(variant))


def _changes(name: str) -> Changes:
    """All that a variant and its ancestors change, the youngest last."""
    if not name:
        return {}
    parent, changed = VARIANTS[name]
    return _changes(parent) | changed
