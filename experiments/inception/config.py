"""Section 4.2: Inception and its batch-normalised variants.

    python -m experiments.inception --config=bn_x5 --data_dir=...
    python -m experiments.inception --config=bn_x5,small

A variant is its parent and the few lines that the paper names. The first command needs
ImageNet (docs/imagenet.md); the second trains the same network at reduced width on
cluttered MNIST, which comes with the project. docs/inception.md has the times and the
numbers to expect.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from experiments.configuration.fields import (
    Check,
    Configuration,
    Field,
    Role,
    at_least,
    positive,
    share,
)
from experiments.configuration.shared import launching, population_batches
from experiments.inception.table import POOL_PROJECTIONS, TABLE


# Choices are named here, and what makes them elsewhere: that imports JAX, for which a
# question for --help does not wait.
def _is_optimiser(text: Any) -> bool:
    from experiments.training.optimisers import OPTIMISERS, is_call

    return is_call(text, OPTIMISERS)


def _is_schedule(text: Any) -> bool:
    from experiments.training.optimisers import SCHEDULES, is_call

    return is_call(text, SCHEDULES)


# What a trained network computes. The defaults are the paper's baseline, at its size.
NETWORK = {
    "batch_norm": Field(False, "normalise before every nonlinearity"),
    "activation": Field(
        "relu", "the nonlinearity", choices=("relu", "sigmoid", "tanh")
    ),
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

# What public code disagrees on; runs from before these keys had the defaults.
CONVENTIONS = {
    "padding": Field(
        "tensorflow",
        "caffe: strided convolutions pad both sides alike, and averages count padding",
        choices=("tensorflow", "caffe"),
    ),
    "input_shift": Field(
        (), "added to red, green and blue, which are -1 to 1; (): nothing"
    ),
}

# How it starts, and what its layers do in training alone.
START = {
    "dropout_rate": Field(0.4, "before the softmax layer", share()),
    # It remembers a thousand steps, short beside millions.
    "decay": Field(0.999, "of the moving average of batch statistics", share()),
    # The paper gives none for Inception, a variant of GoogLeNet. That network's train
    # without batch normalisation; with one deviation in all layers none do.
    "initialisation": Field(
        "googlenet",
        "of weights: googlenet: a deviation a kind of layer, and biases of 0.2; "
        "gaussian: one deviation; he: He et al. 2015",
        choices=("googlenet", "gaussian", "he"),
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
        Check(_is_optimiser, "sgd, lars or adamw, with arguments of its own or none"),
    ),
    "schedule": Field(
        "staircase",
        "of the rate, alone or with its arguments, as cosine(alpha=0.01)",
        Check(
            _is_schedule,
            "constant, staircase, linear or cosine, with arguments of its own or none",
        ),
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
    # The paper's replicas worked side by side; it doesn't say how late they were.
    "gradient_delay": Field(
        0, "steps by which gradients are those of older parameters", at_least(0)
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
    "distortions": Field(
        "strong", "photometric distortions", choices=("none", "weak", "strong")
    ),
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
    **CONVENTIONS,
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
    # Those whose weights others have published (docs/public_weights.md).
    "inception_v2": ("bn_x5", {}),
    "bninception": (
        "bn_x5",
        {
            "pool_projection": 128,
            "separable_stem": False,
            "epsilon": 1e-5,
            "padding": "caffe",
            # Of 255, it takes 128, 117 and 104 off.
            "input_shift": tuple((127.5 - mean) / 127.5 for mean in (128, 117, 104)),
        },
    ),
    # Section 4.2.3: six networks, each with some of larger initial weights, dropout of
    # 5% or 10%, and statistics per activation in the last hidden layers.
    "ensemble_1": ("bn_x30", {"seed": 1, "initial_scale": 2.0}),
    "ensemble_2": ("bn_x30", {"seed": 2, "dropout_rate": 0.05}),
    "ensemble_3": ("bn_x30", {"seed": 3, "dropout_rate": 0.1}),
    "ensemble_4": ("bn_x30", {"seed": 4, "per_activation_rows": ("5b",)}),
    "ensemble_5": ("ensemble_1", {"seed": 5, "dropout_rate": 0.05}),
    "ensemble_6": ("ensemble_3", {"seed": 6, "per_activation_rows": ("5a", "5b")}),
}


# Sizes that a desk has: runs are thousands of times shorter than the paper's, and their
# schedules are its own, scaled as a whole. Of the paper's 31 and 6 million steps each
# has `MILLIONTH` times as many, and the rate falls as often and as far as there.
class Size(NamedTuple):
    """How large runs are, and what they learn from."""

    millionth: int  # steps in place of the paper's million
    changes: Changes


PAPER_LENGTHS = {"whole": 31, "short": 6}  # million steps, by a variant's "length"
PAPER_DECAY = 0.32  # million steps between two falls of the rate

# Images composed of the bundled digits.
DIGITS: Changes = {
    "dataset": "cluttered_mnist",
    "image_size": 64,
    "min_area": 1.0,
    "flip": False,
    "crop_fraction": 1.0,
    "decay": 0.99,
    "eval_every": 250,
    "population_batches": 200,
    "checkpoint_every": 1_000,
}
SMALL: Changes = DIGITS | {
    "width": 0.125,
    "initial_std": 0.15,  # an eighth of the channels: nearly the square root of 8 more
    "decay": 0.95,
    "workers": 0,  # composing takes a fiftieth of a step's time
    "eval_every": 100,
    "eval_examples": 1_000,
    "eval_batch_size": 100,
    "population_batches": 100,
}
# Natural images of 32 x 32, of which random parts of two thirds and more are seen.
PHOTOGRAPHS: Changes = {
    "image_size": 32,
    "min_area": 0.64,
    "crop_fraction": 1.0,
    "shuffle": "examples",  # such sets often lie in one file
    "decay": 0.99,
    "workers": 0,  # so small images are decoded in no time
    "eval_every": 500,
    "population_batches": 200,
    "checkpoint_every": 1_000,
}
# Batches eight times as large, with steps and rates to match.
LARGE_BATCH: Changes = {"batch_size": 256, "learning_rate": 8 * 0.0015}
LARGE_BATCH |= {"eval_every": 60, "checkpoint_every": 250}
CIFAR10: Changes = PHOTOGRAPHS | {"dataset": "cifar10"}
TINY_IMAGENET: Changes = PHOTOGRAPHS | {"dataset": "tiny_imagenet"}
SIZES: dict[str, Size] = {
    "small": Size(200, SMALL),
    "large": Size(1_000, DIGITS),
    "cifar10": Size(1_000, CIFAR10),
    "tiny_imagenet": Size(1_000, TINY_IMAGENET),
    "cifar10_256": Size(125, CIFAR10 | LARGE_BATCH),
    "tiny_imagenet_256": Size(125, TINY_IMAGENET | LARGE_BATCH),
}
PAPER_SIZE = Size(1_000_000, {})


def changes(variant: str, size: str = "") -> Changes:
    """All that a variant changes.

    Args:
      variant: a key of `VARIANTS` (default: inception).
      size: a key of `SIZES` (default: the paper's).
    """
    name = variant or "inception"
    changed = _changes(name) | {"variant": name}
    length = PAPER_LENGTHS[changed.pop("length", "whole")]
    millionth, of_size = SIZES.get(size, PAPER_SIZE)
    schedule = {
        "num_steps": length * millionth,
        "steps_per_decay": round(PAPER_DECAY * millionth),
    }
    return changed | schedule | of_size


def why_as_long(config: Mapping[str, Any]) -> str:
    """Why a run cannot be made longer; empty if it can."""
    from experiments.training.optimisers import spread_over

    text = config["schedule"]
    length = spread_over(text)
    return f"schedule={text} takes {length} from num_steps" if length else ""


CONFIGURATION = Configuration(FIELDS, VARIANTS, tuple(SIZES), changes, why_as_long)


def get_config(variant: str = "") -> ConfigDict:
    """The configuration, by the words after the file's name and a colon."""
    return ConfigDict(CONFIGURATION.values(variant))


def _changes(name: str) -> Changes:
    """All that a variant and its ancestors change, the youngest last."""
    if not name:
        return {}
    parent, changed = VARIANTS[name]
    return _changes(parent) | changed
