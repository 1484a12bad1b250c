"""Runs of the Inception experiment that belong together, for figures and ablations.

    python -m experiments.inception_sweep --sweep=variants
    python -m experiments.inception_sweep --sweep=rates --jobs=2

Each sweep is a table: the name of a run, its variant, and what it changes.
"""

import itertools
from typing import Any, NamedTuple


class SweptRun(NamedTuple):
    """One run of a sweep."""

    name: str  # of its folder
    variant: str  # a key of `experiments.inception.config.VARIANTS`
    changes: dict[str, Any]  # of its configuration


class Sweep(NamedTuple):
    """Runs, and how they are compared."""

    runs: list[SweptRun]
    # For each comparison the name of its folder and its flags.
    comparisons: dict[str, tuple[str, ...]]
    # Flags of the evaluation of all runs together, if there is one.
    evaluation: tuple[str, ...] | None = None


# What the paper's rate is multiplied by for Inception without batch normalisation: the
# paper's own three, and one where the best may lie (GoogLeNet's solver has 0.01).
BASELINE_MULTIPLES = (1.0, 5.0, 10.0, 30.0)
# Of runs that are compared at their beginning.
SHORT = {"num_steps": 600, "decay_factor": 1.0, "eval_every": 200}
# A baseline may stay at chance for a thousand steps before it learns.
RANGE = {"num_steps": 3_000, "decay_factor": 1.0, "eval_every": 500}
# A third to 300 times the paper's.
RATES = (0.0005, 0.0015, 0.0045, 0.0075, 0.015, 0.045, 0.15, 0.45)
INITIALISATIONS = ("googlenet", "gaussian", "he")
BATCH_SIZES = (32, 256)
DELAYS = (0, 4, 16, 64)  # steps


# With He's weights the baseline trains at any width, and best at about ten times the
# paper's rate.
HE = SweptRun("inception_he", "inception_he", {"rate_multiple": 10.0})


def _baselines() -> list[SweptRun]:
    return [
        *(
            SweptRun(
                f"inception_{multiple:g}", "inception", {"rate_multiple": multiple}
            )
            for multiple in BASELINE_MULTIPLES
        ),
        HE,
    ]


def _variants() -> Sweep:
    """Figures 2 and 3, with the two failures that section 4.2.2 reports."""
    # The longest first, so that parallel jobs end together.
    names = (
        *("bn_baseline", "bn_x5", "bn_x30", "bn_x5_sigmoid"),
        *("inception_x5", "inception_sigmoid"),
    )
    return Sweep(
        [*_baselines(), *(SweptRun(name, name, {}) for name in names)],
        {"comparison": (), "rates": ("--x=learning_rate",)},
    )


def _speedup() -> Sweep:
    """The main comparison alone, for several seeds."""
    names = ("bn_x5", "bn_x30")
    return Sweep(
        [*_baselines(), *(SweptRun(name, name, {}) for name in names)],
        {"comparison": ()},
    )


def _range(variant: str, rate: float, **changes: Any) -> SweptRun:
    """A run at a constant rate, of which others differ in the rate."""
    name = "_".join([variant, *(str(value) for value in changes.values()), f"{rate:g}"])
    same_rate = {"learning_rate": rate, "rate_multiple": 1.0}
    return SweptRun(name, variant, RANGE | same_rate | changes)


def _rates() -> Sweep:
    """Which rates learn, by initialisation, with and without batch normalisation."""
    return Sweep(
        [
            _range(variant, rate, initialisation=initialisation)
            for variant, initialisation, rate in itertools.product(
                ("inception", "bn_x5"), INITIALISATIONS, RATES
            )
        ],
        {"comparison": ("--x=learning_rate",)},
    )


def _batch_sizes() -> Sweep:
    """Which rates learn, by batch size, with and without batch normalisation."""
    return Sweep(
        [
            _range(variant, rate, batch_size=batch_size)
            for variant, batch_size, rate in itertools.product(
                ("inception", "bn_x5"), BATCH_SIZES, RATES
            )
        ],
        {"comparison": ("--x=learning_rate",)},
    )


def _delays() -> Sweep:
    """Late gradients at five times the paper's rate, with and without normalisation.

    The paper trained asynchronously: is that why Inception reached infinity there?
    """
    return Sweep(
        [
            SweptRun(
                f"{variant}_{delay}",
                variant,
                {"gradient_delay": delay, "rate_multiple": 5.0},
            )
            for variant, delay in itertools.product(("inception_x5", "bn_x5"), DELAYS)
        ],
        {"comparison": ("--reference=inception_x5 (gradient_delay=0)",)},
    )


def _nonlinearities() -> Sweep:
    """ReLU, sigmoid and tanh, with and without batch normalisation."""
    return Sweep(
        [
            SweptRun(
                f"{variant}_{activation}", variant, SHORT | {"activation": activation}
            )
            for variant, activation in itertools.product(
                ("inception", "bn_x5"), ("relu", "sigmoid", "tanh")
            )
        ],
        {"comparison": ("--reference=inception (activation=relu)",)},
    )


def _ensemble() -> Sweep:
    """Figure 4: the six networks of section 4.2.3."""
    names = [f"ensemble_{number}" for number in range(1, 7)]
    return Sweep(
        [SweptRun(name, name, {}) for name in names],
        {},
        # A CPU takes minutes to see as many images 144 times.
        evaluation=("--crops=1,144", "--examples=500"),
    )


SWEEPS = {
    "variants": _variants(),
    "speedup": _speedup(),
    "rates": _rates(),
    "batch_sizes": _batch_sizes(),
    "delays": _delays(),
    "nonlinearities": _nonlinearities(),
    "ensemble": _ensemble(),
}
