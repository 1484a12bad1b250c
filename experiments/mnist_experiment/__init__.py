"""Section 4.1: sigmoid networks on MNIST; and section 5's other domains."""
