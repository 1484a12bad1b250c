"""`experiments.inception.config`, for command lines that name this file."""

from experiments.inception.config import get_config

__all__ = ["get_config"]
