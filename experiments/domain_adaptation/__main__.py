"""Adapts trained networks to new images by recomputing statistics alone.

    python -m experiments.domain_adaptation [--workdir=runs/domain_adaptation]

Trains the networks of section 4.1, on grey levels, with and without batch
normalisation. Then shows them other images: of inverted contrast, with added noise, and
of a quarter of the brightness. No parameter changes; of the network with batch
normalisation, the statistics of every layer are estimated anew (Algorithm 2) from new
images without labels, as section 5 of the paper suggests.

The workdir receives the accuracies (domains.md and .json).
"""

import json
from pathlib import Path

from absl import flags

from experiments.running import commands

_WORKDIR = flags.DEFINE_string(
    "workdir", "runs/domain_adaptation", "Folder for the table and the numbers."
)
_NUM_STEPS = flags.DEFINE_integer("num_steps", 5_000, "Training steps.", 1)
_NUM_SEEDS = flags.DEFINE_integer("num_seeds", 3, "Seeds, from 0.", 1)
_BATCHES = flags.DEFINE_integer(
    "batches", 200, "Batches of 60 new images that statistics are estimated from.", 1
)


def main(arguments: list[str]) -> None:
    """Trains, adapts and writes what came of it."""
    # Imported here so that --help and wrong flags are answered at once.
    from experiments.configuration.fields import ConfigError
    from experiments.data.image_set import load_image_set
    from experiments.distributed import parallel
    from experiments.domain_adaptation import domains
    from experiments.mnist.config import get_config
    from experiments.running import provenance
    from experiments.running.workdir import WorkdirError, write_whole

    if arguments:
        raise ConfigError(f"unexpected argument {arguments[0]!r} (see --help).")
    config = get_config().to_dict() | {
        "binarise": False,
        "num_steps": _NUM_STEPS.value,
        "num_seeds": _NUM_SEEDS.value,
        "population_batches": _BATCHES.value,
    }
    parallel.check_divisible(config["batch_size"])
    output = Path(_WORKDIR.value)
    results = domains.measure(config, load_image_set("mnist"))
    page = domains.page(results)
    numbers = {**provenance.describe(), "config": config, "domains": results}
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_whole(output / "domains.md", page + "\n")
        write_whole(output / "domains.json", json.dumps(numbers, indent=2) + "\n")
    except OSError as error:
        raise WorkdirError(
            f"cannot write to {output} ({error.strerror}); choose another --workdir."
        ) from None
    print(page)
    print(f"This table and domains.json are in {output}.")


if __name__ == "__main__":
    commands.launch_with_arguments(main, __doc__)
