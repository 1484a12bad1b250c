"""Runs of Inception that belong together, side by side."""
