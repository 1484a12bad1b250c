"""Runs the tiny Inception run, and pauses somewhere so that a test can send a signal.

    python -m tests.experiments.paused_run PLACE CALL [ARGUMENTS ...]

PLACE is MODULE:NAME of a function, or MODULE:CLASS.NAME; there, at its CALL-th call,
the process says so and sleeps for a while before it goes on.
"""

import importlib
import sys
import time
from pathlib import Path
from typing import Any

from experiments.running import commands

PAUSED = "paused here"
SECONDS = 1.0


def main(config: dict[str, Any], workdir: Path, data_dir: str | None) -> None:
    if PLACE == "import":
        pause()
    from tests.experiments.inception.tiny_inception import run_tiny

    if PLACE != "import":
        pause_at(PLACE, int(CALL))
    run_tiny(config, workdir)


def pause() -> None:
    print(PAUSED, flush=True)
    # Not in one piece: a signal that Python's handlers take must not shorten it.
    for _ in range(10):
        time.sleep(SECONDS / 10)


def pause_at(place: str, call: int) -> None:
    module, _, path = place.partition(":")
    *parents, name = path.split(".")
    holder = importlib.import_module(module)
    for parent in parents:
        holder = getattr(holder, parent)
    function = getattr(holder, name)
    calls = 0

    def paused(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            pause()
        return function(*arguments, **options)

    setattr(holder, name, paused)


if __name__ == "__main__":
    program, PLACE, CALL, *arguments = sys.argv
    sys.argv = [program, *arguments]
    commands.launch(
        main, "experiments.inception.config", __doc__, workdir="runs/{variant}"
    )
