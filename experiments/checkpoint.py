"""Looks into checkpoints, checks them, and exports them as plain arrays.

    python -m experiments.checkpoint inspect DIR
    python -m experiments.checkpoint verify DIR
    python -m experiments.checkpoint export DIR --output=network.npz [--fold]

DIR is the workdir of a run, a folder of checkpoints in it (checkpoints, or population
for Algorithm 2's statistics), or one checkpoint.

inspect: which there are, the newest and the best of them, and what the newest holds:
arrays with shapes, dtypes and bytes, the run's configuration, and versions and devices.
verify: reads every array of every checkpoint and compares it with its checksum. Exits
with 1 if one is damaged.
export: parameters and statistics of the newest checkpoint, by names such as
params/conv1/kernel, to FILE.npz or FILE.safetensors; or, to FILE.stablehlo, the program
from images to class probabilities, which jax.export runs without this package. With
--fold batch normalisations are folded into the layers before them, where there is one.
"""

from pathlib import Path

from absl import flags

from experiments.running import commands

_STEP = flags.DEFINE_string(
    "step", "newest", "Which checkpoint to inspect or export: newest, best or a number."
)
_OUTPUT = flags.DEFINE_string(
    "output",
    None,
    "File to export to; it ends with .npz, .safetensors or .stablehlo.",
)
_NETWORK = flags.DEFINE_string(
    "network", None, "Network to export, where there are several (default: all)."
)
_REPLICA = flags.DEFINE_integer(
    "replica",
    0,
    "Which program to export, of networks that were trained side by side.",
    lower_bound=0,
)
_FOLD = flags.DEFINE_bool("fold", False, "Whether to export the folded network.")


def main(arguments: list[str]) -> None:
    """Does what the first argument says with the folder that is the second."""
    # Imported here so that --help and wrong flags are answered at once.
    import jax

    from experiments.checkpoints import export, inspect
    from experiments.configuration.fields import ConfigError

    # Nothing is trained here: accelerators are for the runs that may have them.
    jax.config.update("jax_platforms", "cpu")
    actions = {
        "inspect": lambda folder: inspect.inspect(folder, _STEP.value),
        "verify": inspect.verify,
        "export": lambda folder: export.export(
            *(folder, _STEP.value, _OUTPUT.value),
            *(_NETWORK.value, _FOLD.value, _REPLICA.value),
        ),
    }
    if len(arguments) != 2 or arguments[0] not in actions:
        raise ConfigError(
            f"got {' '.join(arguments) or 'nothing'}: expected one of "
            f"{', '.join(actions)}, and a folder (see --help)."
        )
    action, folder = arguments
    actions[action](Path(folder))


if __name__ == "__main__":
    commands.launch_with_arguments(main, __doc__)
