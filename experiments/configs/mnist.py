"""`experiments.mnist.config`, for command lines that name this file."""

from experiments.mnist.config import get_config

__all__ = ["get_config"]
