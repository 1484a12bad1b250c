"""Training over devices and processes, and what these agree on."""
