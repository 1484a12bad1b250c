"""Compares training runs: the paper's figures 2 and 3.

    python -m experiments.compare RUN... [--output=DIR] [--reference=NAME]
    python -m experiments.compare RUN... --x=learning_rate

A RUN is the workdir of a run of experiments.inception, finished or not, or a folder
that contains some. Runs that differ in their seed alone are one model. References are
the models whose best accuracy the others are to reach: by default Inception without
batch normalisation at the paper's rate, and the best of the rates and initial weights
that there are.

The output folder receives accuracy against steps (figure2.png and .svg), steps to the
references' best accuracy and best accuracy (figure3.png and .svg), and the numbers
beside the paper's (comparison.md and .json). With --x=learning_rate it receives best
accuracy against the learning rate instead, a line for the models that differ in nothing
else (rates.png, .svg, .md and .json).
"""

import json
from pathlib import Path

from absl import flags

from experiments.running import commands

_OUTPUT = flags.DEFINE_string(
    "output", "runs/comparison", "Folder for the figures and tables."
)
_REFERENCES = flags.DEFINE_multi_string(
    "reference", [], "Name of a model to compare with; may be given more than once."
)
_X = flags.DEFINE_enum(
    "x", "steps", ["steps", "learning_rate"], "What accuracy is drawn against."
)


def main(arguments: list[str]) -> None:
    """Compares the runs in the folders that are given."""
    # Imported here so that --help and wrong flags are answered at once.
    from experiments.inception.comparison import figures, tables
    from experiments.inception.comparison.models import compare, compare_rates
    from experiments.inception.comparison.runs import read_runs
    from experiments.running.figures import save
    from experiments.running.workdir import WorkdirError, write_whole

    runs = read_runs([Path(argument) for argument in arguments])
    if _X.value == "learning_rate":
        name, numbers = "rates", compare_rates(runs)
        page = tables.rates_page(numbers)
        pictures = {"rates": figures.accuracy_against_rate(numbers)}
    else:
        name, numbers = "comparison", compare(runs, _REFERENCES.value)
        page = tables.comparison_page(numbers)
        pictures = {
            "figure2": figures.figure2(numbers),
            "figure3": figures.figure3(numbers),
        }
    output = Path(_OUTPUT.value)
    try:
        output.mkdir(parents=True, exist_ok=True)
        for file_name, picture in pictures.items():
            save(picture, output / file_name)
        write_whole(output / f"{name}.md", page)
        write_whole(output / f"{name}.json", json.dumps(numbers, indent=2) + "\n")
    except OSError as error:
        raise WorkdirError(
            f"cannot write to {output} ({error.strerror}); choose another --output."
        ) from None
    print(page)
    print(f"This page, its figures and {name}.json are in {output}.")


if __name__ == "__main__":
    commands.launch_with_arguments(main, __doc__)
