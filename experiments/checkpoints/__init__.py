"""Checkpoints: writing, checking and reading them, for a run and for other uses."""
