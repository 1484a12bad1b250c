"""Section 5: new data for a trained network, and new statistics."""
