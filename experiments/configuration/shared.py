"""Fields that several experiments have."""

from experiments.configuration.fields import Field, Role, at_least

Fields = dict[str, Field]


def several(num_seeds: int, differ_in: str) -> Fields:
    """Runs side by side that differ in their seed."""
    return {
        "num_seeds": Field(num_seeds, f"runs that differ in {differ_in}", at_least(1)),
        "first_seed": Field(
            0, "seeds are first_seed, first_seed + 1, ...", at_least(0)
        ),
    }


def population_batches() -> Field:
    """How many batches population statistics come from."""
    return Field(1_000, "training batches that Algorithm 2 averages over", at_least(1))


def launching(checkpoint_every: int) -> Fields:
    """Who shares the work, and how; and how often it is saved."""
    return {
        "checkpoint_every": Field(
            checkpoint_every,
            "steps between checkpoints",
            at_least(1),
            role=Role.LAUNCH,
        ),
        "moments": Field(
            "global", "shared by all devices; local: by none; 4, say: by so many"
        ),
        "parallelism": Field(
            "pmap",
            "what maps a step over devices",
            choices=("pmap", "shard_map"),
            role=Role.LAUNCH,
        ),
        "dry_run": Field(
            False,
            "print what the run would need and take, and stop",
            role=Role.LAUNCH,
        ),
    }
