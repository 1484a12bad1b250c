"""The data sets of the experiments and the order in which training sees them."""
