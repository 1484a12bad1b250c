"""Accuracy against batch size, for batch normalisation and its alternatives."""
