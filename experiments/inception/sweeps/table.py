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


# Of runs that are compared at their beginning.
SHORT = {"num_steps": 600, "decay_factor": 1.0, "eval_every": 200}
# 0.3 to 100 times that of the small baseline.
RATES = (0.003, 0.01, 0.02, 0.05, 0.1, 0.3, 1.0)


def _variants() -> Sweep:
    """Figures 2 and 3, with the two failures that section 4.2.2 reports."""
    # The longest first, so that parallel jobs end together.
    names = (
        *("bn_baseline", "inception", "inception_sigmoid", "inception_he"),
        *("bn_x5", "bn_x30", "bn_x5_sigmoid", "inception_x5"),
    )
    return Sweep(
        [SweptRun(name, name, {}) for name in names],
        {
            "comparison": ("--reference=inception",),
            "comparison_he": ("--reference=inception_he",),
        },
    )


def _speedup() -> Sweep:
    """The main comparison alone, for several seeds."""
    names = ("inception_he", "bn_x5")
    return Sweep(
        [SweptRun(name, name, {}) for name in names],
        {"comparison": ("--reference=inception_he",)},
    )


def _rates() -> Sweep:
    """Rates and initialisations, with and without batch normalisation."""
    return Sweep(
        [
            SweptRun(
                f"{variant}_{initialisation}_{rate:g}",
                variant,
                SHORT
                | {
                    "initialisation": initialisation,
                    "learning_rate": rate,
                    "rate_multiple": 1.0,
                },
            )
            for variant, initialisation, rate in itertools.product(
                ("inception", "bn_x5"), ("gaussian", "he"), RATES
            )
        ],
        {"comparison": ("--x=learning_rate",)},
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
    "nonlinearities": _nonlinearities(),
    "ensemble": _ensemble(),
}
