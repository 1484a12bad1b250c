"""A network's state, its training step, and its evaluation."""
