"""How long processes wait for each other, in seconds: on one machine, and far away."""

START_SECONDS = (30, 300)  # for one that has not come
SILENCE_SECONDS = (20, 100)  # after which one that is silent counts as lost
