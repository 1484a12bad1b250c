"""Checks of an experiment's configuration, before any long work starts."""

from collections.abc import Mapping
from typing import Any


class ConfigError(ValueError):
    """A configuration value makes no sense."""


def check_at_least(config: Mapping[str, Any], minimum: float, *keys: str) -> None:
    """Checks that values, or all entries of tuples, reach a minimum.

    Raises:
      ConfigError: one does not.
    """
    for key in keys:
        for value in as_tuple(config[key]):
            if not value >= minimum:
                raise ConfigError(
                    f"--config.{key}={config[key]}: expected at least {minimum}."
                )


def check_positive(config: Mapping[str, Any], *keys: str) -> None:
    """Checks that values, or all entries of tuples, are finite and above 0.

    Raises:
      ConfigError: one is not.
    """
    for key in keys:
        for value in as_tuple(config[key]):
            if not 0 < value < float("inf"):
                raise ConfigError(
                    f"--config.{key}={config[key]}: expected a positive number."
                )


def as_tuple(value: Any) -> tuple[Any, ...]:
    """A value that may be one or several, as several."""
    return tuple(value) if isinstance(value, tuple | list) else (value,)
