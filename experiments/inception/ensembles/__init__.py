"""Trained networks alone and together, on several crops: the paper's figure 4."""
