"""Makes a run of weights that others have published, to evaluate or to go on with.

    python -m experiments.import_weights FILE --config=NETWORK --data_dir=DIR

NETWORK bninception: FILE is the state of Cadene's (.pth, also as .safetensors or .npz
of the same names). NETWORK inception_v2: it is a checkpoint of TF-Slim's
(inception_v2.ckpt, or the name that .index and .data files begin with). Nothing in it
is executed.

The workdir is then that of a run of experiments.inception of this configuration, before
its first step and evaluated once: experiments.evaluate and experiments.checkpoint take
it, and experiments.inception with the same flags trains on from there. Of data with
other classes the last layer starts anew.
"""

from pathlib import Path
from typing import Any

from experiments.running import commands


def main(
    config: dict[str, Any], workdir: Path, data_dir: str | None, file: str
) -> None:
    """Imports a file."""
    # Imported here so that --help and wrong flags are answered at once.
    from experiments.weights.importing import import_weights

    import_weights(Path(file), config, workdir, data_dir)


if __name__ == "__main__":
    commands.launch(
        main,
        "experiments.inception.config",
        __doc__,
        workdir="runs/{variant}_imported",
        positional=("FILE",),
    )
