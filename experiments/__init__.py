"""Training loops that reproduce the experiments of Ioffe & Szegedy 2015."""
