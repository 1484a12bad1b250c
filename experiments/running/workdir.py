"""The folder of one run: its configuration, its owner, and files written whole."""

import fcntl
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from experiments.configuration.fields import Configuration
from experiments.running.new_files import open_lock, whole_file


class WorkdirError(RuntimeError):
    """The folder of a run cannot be used."""


def open_workdir(
    workdir: Path, config: Mapping[str, Any], configuration: Configuration
) -> TextIO:
    """Makes the folder, or takes up an earlier run of the same configuration.

    Args:
      workdir: the folder; made if it is missing.
      config: plain values; written to `config.json` there.
      configuration: which of them a run that goes on may change.

    Returns:
      A lock that holds as long as it is open: no second process may write here.

    Raises:
      WorkdirError: the folder cannot be written, is in use, or belongs to a run of
        another configuration.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = open_lock(workdir / ".lock")
    except OSError as error:
        raise WorkdirError(
            f"cannot write to the workdir {workdir} ({error.strerror}); choose another "
            "with --workdir."
        ) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        check_same_config(workdir, json.loads(json.dumps(config)), configuration)
    except BlockingIOError:
        lock.close()
        raise WorkdirError(
            f"another process is writing to {workdir}; wait for it, or choose another "
            "folder with --workdir."
        ) from None
    except BaseException:
        lock.close()
        raise
    return lock


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that a reader, or a killed run, never sees half of it."""
    with whole_file(path) as file:
        file.write(text.encode())


def read_json(path: Path) -> dict[str, Any]:
    """Reads an object that `write_whole` wrote.

    Raises:
      WorkdirError: something damaged it since.
    """
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("it holds no JSON object")
    except ValueError as error:
        raise WorkdirError(
            f"{path} is damaged ({error}); restore it, or choose another --workdir."
        ) from None
    return content


def check_same_config(
    workdir: Path, config: Mapping[str, Any], configuration: Configuration
) -> None:
    """Compares a configuration with that of the folder; where it has none, writes it.

    Raises:
      WorkdirError: they differ.
    """
    path = workdir / "config.json"
    if not path.exists():
        write_whole(path, json.dumps(config, indent=2) + "\n")
        return
    differences = configuration.differences(read_json(path), config)
    if differences:
        raise WorkdirError(
            f"{workdir} holds a run of another configuration: "
            f"{'; '.join(differences)}. Choose another --workdir, or give that "
            "configuration to go on with it."
        )
