"""One file per experiment: every choice it makes, with its reason; and checks."""
