"""`experiments.checkpoints.load`, by its former name."""

from experiments.checkpoints.load import Adapted, adapt, load_variables

__all__ = ["Adapted", "adapt", "load_variables"]
