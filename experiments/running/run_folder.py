"""The folder of one run, for all processes that take part in it."""

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from experiments.configuration.fields import Configuration, as_json
from experiments.distributed import processes
from experiments.distributed.processes import ProcessesError
from experiments.running.workdir import (
    WorkdirError,
    check_same_config,
    open_workdir,
    write_whole,
)

# What a process that fails leaves there for those that notice its absence.
FAILURE_FILE = ".failure.json"
SECONDS_FOR_NEWS = 3.0  # until that file shows, on a shared file system too
# What errors say whose cause is the end of another process, as far as they know.
CONTACT_LOST = (
    *("Gloo", "NCCL", "Connection reset", "Connection closed", "Socket closed"),
    *("UNAVAILABLE", "DEADLINE_EXCEEDED", "coordination service", "heartbeat"),
)


class LostProcessError(ProcessesError):
    """Another process ended or fell silent; a new start goes on."""


@contextlib.contextmanager
def open_run(
    workdir: Path, config: Mapping[str, Any], configuration: Configuration
) -> Iterator[None]:
    """Makes the folder, or takes up an earlier run, in all processes.

    An error that is raised inside, in one process, ends the others with its message.

    Args:
      workdir: the folder, which all processes see.
      config: plain values, the same in all processes.
      configuration: which of them a run that goes on may change.

    Raises:
      WorkdirError: the folder cannot be used, as `open_workdir` says, or a process
        does not see it.
      ProcessesError: another process failed.
      LostProcessError: another process was lost.
    """
    with contextlib.ExitStack() as stack:

        def open_first() -> None:
            lock = open_workdir(workdir, config, configuration)
            stack.callback(lock.close)
            (workdir / FAILURE_FILE).unlink(missing_ok=True)

        processes.in_first_process(open_first)
        processes.in_every_process(lambda: _check_seen(workdir, config, configuration))
        try:
            yield
        except Exception as error:
            if jax.process_count() == 1 or processes.is_known_to_all(error):
                raise
            if (explanation := _explain(error, workdir)) is None:
                raise
            raise explanation from error


def _check_seen(
    workdir: Path, config: Mapping[str, Any], configuration: Configuration
) -> None:
    deadline = time.monotonic() + SECONDS_FOR_NEWS
    path = workdir / "config.json"
    while not path.exists():
        if time.monotonic() > deadline:
            raise WorkdirError(
                f"{path}, which process 0 has written, is not to be seen; give all "
                "processes one --workdir, on a file system that they share."
            )
        time.sleep(0.1)
    check_same_config(workdir, as_json(config), configuration)


def _explain(error: Exception, workdir: Path) -> ProcessesError | None:
    """Why this process fails; None, and a note for the others, if by its own error."""
    path = workdir / FAILURE_FILE
    seems_lost = any(sign in f"{error} {error.__cause__}" for sign in CONTACT_LOST)
    deadline = time.monotonic() + (SECONDS_FOR_NEWS if seems_lost else 0)
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    with contextlib.suppress(OSError, ValueError):
        note = json.loads(path.read_text())
        return ProcessesError(f"process {note['process']} failed: {note['error']}")
    if seems_lost:
        summary = " ".join(str(error).split())[:300]
        return LostProcessError(
            "lost contact with another process: it was killed, or its machine or the "
            f"network failed; its own log may say more ({summary}). The same command "
            "in all processes goes on from the last checkpoint."
        )
    note = {"process": jax.process_index(), "error": f"{error or type(error).__name__}"}
    with contextlib.suppress(OSError):
        partial = path.with_name(f"{path.name}.{jax.process_index()}")
        write_whole(partial, json.dumps(note))
        partial.replace(path)
    return None
