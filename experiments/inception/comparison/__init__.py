"""What runs of Inception show beside each other: the paper's figures 2 and 3."""
