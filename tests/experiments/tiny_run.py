"""Runs `experiments.inception` with the tiny network and data of `tiny_inception`.

python -m tests.experiments.tiny_run [ARGUMENTS ...]
"""

import runpy

from tests.experiments.tiny_inception import TINY, tiny_experiments


def tiny_arguments(
    workdir: object, variant: str = "bn_x5", **changes: object
) -> list[str]:
    """The command line of a tiny run."""
    changed = TINY | changes
    return [
        f"--config=experiments/configs/inception.py:{variant},small",
        *(f"--config.{key}={value}" for key, value in changed.items()),
        f"--workdir={workdir}",
    ]


if __name__ == "__main__":
    with tiny_experiments():
        runpy.run_module("experiments.inception", run_name="__main__", alter_sys=True)
