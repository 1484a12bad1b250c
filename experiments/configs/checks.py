"""Checks of an experiment's configuration, before any long work starts."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# They say how a run is launched, not what it computes: another start may change them.
LAUNCH_KEYS = ("parallelism", "workers", "threads", "dry_run")


class ConfigError(ValueError):
    """A configuration value makes no sense."""


def check_keys(config: Mapping[str, Any], keys: Iterable[str]) -> None:
    """Checks that a configuration, which may come from a user's file, is complete.

    Raises:
      ConfigError: keys are missing.
    """
    missing = sorted(set(keys) - set(config))
    if missing:
        raise ConfigError(
            f"the configuration lacks {', '.join(missing)}; start from get_config() of "
            "the experiment's own file."
        )


def check_at_least(config: Mapping[str, Any], minimum: int, *keys: str) -> None:
    """Checks that values, or all entries of tuples, are int32 and reach a minimum.

    Raises:
      ConfigError: one does not.
    """
    for key in keys:
        for value in as_tuple(config[key]):
            if not (isinstance(value, int) and minimum <= value < 2**31):
                raise ConfigError(
                    f"--config.{key}={config[key]}: expected at least {minimum}, "
                    "a whole number below 2^31."
                )


def check_positive(config: Mapping[str, Any], *keys: str) -> None:
    """Checks that values, or all entries of tuples, are finite and above 0.

    Raises:
      ConfigError: one is not, or a tuple is empty.
    """
    for key in keys:
        values = as_tuple(config[key])
        if not values or not all(
            isinstance(value, int | float) and 0 < value < math.inf for value in values
        ):
            raise ConfigError(
                f"--config.{key}={config[key]}: expected a positive number."
            )


def check_shares(config: Mapping[str, Any], *keys: str) -> None:
    """Checks that values are from 0 to 1.

    Raises:
      ConfigError: one is not.
    """
    for key in keys:
        value = config[key]
        if not (isinstance(value, int | float) and 0 <= value <= 1):
            raise ConfigError(f"--config.{key}={value}: expected 0 to 1.")


def check_one_of(
    config: Mapping[str, Any], choices: Mapping[str, Sequence[Any]]
) -> None:
    """Checks that values are among those that there are.

    Args:
      config: the configuration.
      choices: for each key its values.

    Raises:
      ConfigError: one is not.
    """
    for key, values in choices.items():
        if config[key] not in values:
            raise ConfigError(
                f"--config.{key}={config[key]}: expected one of "
                f"{', '.join(map(str, values))}."
            )


def as_tuple(value: Any) -> tuple[Any, ...]:
    """A value that may be one or several, as several."""
    return tuple(value) if isinstance(value, tuple | list) else (value,)
