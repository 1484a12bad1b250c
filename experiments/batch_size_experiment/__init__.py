"""Accuracy against the batch size, for several normalisations."""
