"""Section 4.2: Inception and its batch-normalised variants.

    CONFIG=experiments/configs/inception.py
    python -m experiments.inception --config=$CONFIG:bn_x5 --data_dir=...
    python -m experiments.inception --config=$CONFIG:bn_x5,small

A variant is its parent and the few lines that the paper names. The first command needs
ImageNet (docs/imagenet.md); the second trains the same network at reduced width on
cluttered MNIST, which comes with the project. docs/inception.md has the times and the
numbers to expect.
"""

from typing import Any

from ml_collections import ConfigDict

# Key: default, and what it means. The defaults are the paper's baseline, at its size.
KEYS: dict[str, tuple[Any, str]] = {
    "variant": ("inception", "name of the model in tables and figures"),
    "seed": (0, "of the initial weights, the data's order and its augmentation"),
    # The network.
    "batch_norm": (False, "normalise before every nonlinearity"),
    "activation": ("relu", "relu, sigmoid or tanh"),
    "dropout_rate": (0.4, "before the softmax layer"),
    "local_response_norm": (
        True,
        "across neighbouring channels, after conv1 and conv2",
    ),
    "per_activation_rows": ((), "rows whose statistics are per activation, as ('5b',)"),
    "width": (1.0, "what all numbers of channels are multiplied by"),
    "pool_projection": (96, "reading of the paper's table for 4c and 4d: 96 or 128"),
    "separable_stem": (True, "factor the first convolution, depth multiplier 8"),
    "auxiliary_head": (False, "GoogLeNet's second classifier, on row 4a"),
    # eps as TF-Slim's Inception has it. The decay remembers a thousand steps, short
    # beside millions.
    "epsilon": (1e-3, "added to the variance"),
    "decay": (0.999, "of the moving average of batch statistics"),
    # The paper's time drew weights from small Gaussians; it gives no deviation. This
    # one lets a signal through 23 rectified layers of the paper's widths.
    "initialisation": ("gaussian", "gaussian, or he (He et al. 2015)"),
    "initial_std": (0.05, "standard deviation of gaussian initial weights"),
    "initial_scale": (1.0, "what initial weights of convolutions are multiplied by"),
    "dtype": ("float32", "of the computation, or bfloat16; parameters are float32"),
    "rematerialise": (False, "recompute normalisations in the backward pass"),
    # Training. Momentum, rate schedule and L2 weight are not in the paper: the first
    # two are GoogLeNet's (4% down every 8 epochs: 320,000 batches of 32), the third is
    # that of its published Caffe model. A fifth of it is what TF-Slim trains this
    # network with.
    "batch_size": (32, "examples a step, over all devices"),
    "num_steps": (31_000_000, "training steps"),
    "learning_rate": (0.0015, "the baseline's initial step size"),
    "rate_multiple": (1.0, "what the variant multiplies it by"),
    "momentum": (0.9, "of SGD"),
    "decay_factor": (0.96, "what the rate is multiplied by, in a staircase"),
    "steps_per_decay": (320_000, "steps between these, for the baseline"),
    "decay_speed": (1.0, "how many times faster the variant's rate decays"),
    "l2_weight": (2e-4, "of the penalty on weights, half of it times their squares"),
    "l2_multiple": (1.0, "what the variant multiplies it by"),
    # Data.
    "dataset": ("imagenet2012", "tensorflow-datasets name, or cluttered_mnist"),
    "image_size": (224, "side of the network's input: 32 or more"),
    "shuffle": ("shards", "what is shuffled: shards, or examples (across shards)"),
    "distortions": ("strong", "photometric distortions: none, weak or strong"),
    "min_area": (0.08, "of a random crop, as a share of the image; 1: no crop"),
    "flip": (True, "mirror half of the training images, and crops in evaluation"),
    "crop_fraction": (0.875, "of the shorter side, that a centre crop sees"),
    "workers": (-1, "processes that make batches; 0: a thread; -1: one a core"),
    "max_undecodable": (100, "images that may turn out broken before a run stops"),
    # Measuring.
    "eval_every": (50_000, "steps between evaluations"),
    "eval_examples": (0, "of the validation set, while training; 0: all"),
    "eval_batch_size": (256, "examples a step of an evaluation, over all devices"),
    "population_batches": (1_000, "training batches that Algorithm 2 averages over"),
    "checkpoint_every": (10_000, "steps between checkpoints"),
    # Launching: who shares the work, and how.
    "moments": ("global", "shared by all devices; local: by none; 4, say: by so many"),
    "parallelism": ("pmap", "what maps a step over devices: pmap or shard_map"),
    "dry_run": (False, "print what the run would need and take, and stop"),
}

# Section 4.2.2. Each entry: its parent, and what changes.
Changes = dict[str, Any]
VARIANTS: dict[str, tuple[str, Changes]] = {
    "inception": ("", {}),
    # The paper's failures, as long as the BN-x5 that they are failures beside.
    "inception_x5": ("inception", {"rate_multiple": 5.0, "num_steps": 6_000_000}),
    "inception_sigmoid": (
        "inception",
        {"activation": "sigmoid", "num_steps": 6_000_000},
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
            "num_steps": 6_000_000,  # after which BN-x30 reached its best
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
STEPS = "steps"  # by the paper's number of steps
LARGE: Changes = {
    STEPS: {31_000_000: 31_000, 6_000_000: 12_000},
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
    STEPS: {31_000_000: 6_200, 6_000_000: 2_400},
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


def get_config(variant: str = "") -> ConfigDict:
    """The configuration, by the words after the file's name and a colon.

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
    config = {key: default for key, (default, _) in KEYS.items()}
    config |= _changes(name) | {"variant": name}
    if size:
        changes = dict(SIZES[size])
        steps = changes.pop(STEPS)
        config |= changes | {"num_steps": steps[config["num_steps"]]}
    return ConfigDict(config)


def _changes(name: str) -> Changes:
    """All that a variant and its ancestors change, the youngest last."""
    if not name:
        return {}
    parent, changes = VARIANTS[name]
    return _changes(parent) | changes
