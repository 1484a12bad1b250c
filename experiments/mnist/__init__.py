"""Section 4.1: sigmoid networks on MNIST, with and without batch normalisation."""
