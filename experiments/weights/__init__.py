"""Weights that others have trained and published, for the Inception network."""
