"""Evaluates trained networks, singly and as an ensemble: the paper's figure 4.

    python -m experiments.evaluate RUN... [--crops=1,10,144] [--data_dir=...]

A RUN is the workdir of a run of experiments.inception, or a folder that contains some.
Several runs make an ensemble, whose prediction is the mean of their class
probabilities; they must see the same images. With more than one crop the prediction is
the mean over crops as well: the corners, the centre and their mirror images (10), or
the paper's 144.

Networks normalise by the statistics of the population, which a run estimates when it is
finished, or by moving averages, which a run has from its first checkpoint on, also
while it trains. The output folder receives both errors in the form of figure 4, with
the paper's rows (figure4.md and .json), and as a picture (figure4.png and .svg).
"""

import contextlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from experiments.configuration.fields import ConfigError
from experiments.running import commands
from experiments.running.workdir import WorkdirError

CROPS = ("1", "10", "144")

_CROPS = flags.DEFINE_multi_string(
    "crops",
    "1",
    "Crops of each image: 1, 10 or 144; or several of these numbers, with commas or "
    "in several flags",
)
_DATA_DIR = flags.DEFINE_string(
    "data_dir",
    None,
    "Folder of prepared tensorflow-datasets (default: their own, "
    "~/tensorflow_datasets).",
)
_STATISTICS = flags.DEFINE_enum(
    "statistics",
    "population",
    ["population", "moving_average"],
    "What batch normalisation takes for mean and variance.",
)
_EXAMPLES = flags.DEFINE_integer(
    "examples", 0, "How many of the first test images; 0: all.", lower_bound=0
)
_OUTPUT = flags.DEFINE_string(
    "output", "runs/evaluation", "Folder for the table and the figure."
)


def main(arguments: list[str], network: Any = None, load: Any = None) -> None:
    """Evaluates the runs in the folders that are given.

    Args:
      arguments: the folders.
      network: the class that they trained, with `Inception`'s attributes; None: that.
      load: opens data sets; None: `experiments.data.datasets.load_splits`.
    """
    crops = parse_crops(_CROPS.value)
    # Imported here so that --help and wrong flags are answered at once.
    from experiments.inception.comparison.runs import read_runs

    runs = read_runs([Path(argument) for argument in arguments])

    from experiments.data.datasets import load_splits
    from experiments.inception.ensembles import errors as ensemble
    from experiments.inception.ensembles import tables, trained_networks
    from experiments.inception.network import Inception
    from experiments.running.figures import save
    from experiments.running.workdir import write_whole

    trained_networks.check_runs(runs, _STATISTICS.value)
    data = trained_networks.open_data(runs, _DATA_DIR.value, load or load_splits)
    networks = trained_networks.load_networks(
        runs, _STATISTICS.value, data, network or Inception
    )
    output = Path(_OUTPUT.value)
    with _writing_to(output):
        output.mkdir(parents=True, exist_ok=True)
        # What is wrong with the folder is to show before the long work, not after it.
        with tempfile.TemporaryFile(dir=output):
            pass
    numbers = ensemble.evaluate(networks, data, crops, _EXAMPLES.value)
    page = tables.figure4_page(numbers)
    content = {**numbers, "paper": tables.PAPER}
    with _writing_to(output):
        save(tables.figure4(numbers), output / "figure4")
        write_whole(output / "figure4.md", page)
        write_whole(output / "figure4.json", json.dumps(content, indent=2) + "\n")
    print(page)
    data.report_undecodable()
    print(f"This page, its figure and figure4.json are in {output}.")


def parse_crops(values: Sequence[str]) -> list[int]:
    """The numbers in the values of --crops, each once, the smallest first.

    Raises:
      ConfigError: there is none, or one that does not exist.
    """
    numbers = ",".join(values).split(",")
    for number in numbers:
        if number not in CROPS:
            raise ConfigError(
                f"--crops={','.join(values)}: expected {', '.join(CROPS)}, or several "
                "of these with commas."
            )
    return sorted({int(number) for number in numbers})


@contextlib.contextmanager
def _writing_to(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WorkdirError(
            f"cannot write to {output} ({error.strerror}); choose another --output."
        ) from None


if __name__ == "__main__":
    commands.launch_with_arguments(main, __doc__)
