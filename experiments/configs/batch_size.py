"""`experiments.batch_size.config`, for command lines that name this file."""

from experiments.batch_size.config import get_config

__all__ = ["get_config"]
