"""Runs the Inception experiment with its tiny network and data, as a process.

python -m tests.experiments.tiny_inception_run KEY=INTEGER ... workdir=FOLDER
"""

import sys
from pathlib import Path

from experiments import inception_training
from tests.experiments.tiny_inception import tiny_config, tiny_experiments


def main() -> None:
    given = dict(argument.split("=") for argument in sys.argv[1:])
    workdir = given.pop("workdir")
    config = tiny_config(**{key: int(value) for key, value in given.items()})
    with tiny_experiments():
        inception_training.run(config, Path(workdir), None)


if __name__ == "__main__":
    main()
