"""What can be wrong with published weights."""

from experiments.configuration.fields import ConfigError


class WeightsError(ConfigError):
    """A file of weights cannot be read, or is of another network."""
