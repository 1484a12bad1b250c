"""Images as sequences: LSTMs with and without recurrent batch normalisation."""
