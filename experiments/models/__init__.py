"""The paper's networks, as Flax linen modules."""
