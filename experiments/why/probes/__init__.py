"""Measurements of a network, and changed normalisations, as pure functions."""
