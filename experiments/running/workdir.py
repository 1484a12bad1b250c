"""The folder of one run: its configuration, its owner, and files written whole."""

import contextlib
import fcntl
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TextIO

from experiments.configuration.fields import Configuration, as_json
from experiments.running import sealed
from experiments.running.new_files import open_lock, whole_file


class WorkdirError(RuntimeError):
    """The folder of a run cannot be used."""


def open_workdir(
    workdir: Path, config: Mapping[str, Any], configuration: Configuration
) -> contextlib.ExitStack:
    """Makes the folder, or takes up an earlier run of the same configuration.

    Args:
      workdir: the folder; made if it is missing.
      config: plain values; written to `config.json` there.
      configuration: which of them a run that goes on may change.

    Returns:
      Locks that hold until it is closed: no second process may write here.

    Raises:
      WorkdirError: the folder cannot be written, is in use, or belongs to a run of
        another configuration.
    """
    with contextlib.ExitStack() as locks:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            file = locks.enter_context(open_lock(workdir / ".lock"))
            # Beside the file, which somebody may delete.
            folder = os.open(workdir, os.O_RDONLY)
            locks.callback(os.close, folder)
        except OSError as error:
            raise WorkdirError(
                f"cannot write to the workdir {workdir} ({error.strerror}); choose "
                "another with --workdir."
            ) from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _lock_folder(folder)
        except BlockingIOError:
            raise WorkdirError(
                f"another process is writing to {workdir}; wait for it, or choose "
                "another folder with --workdir."
            ) from None
        check_same_config(workdir, as_json(config), configuration)
        return locks.pop_all()


def _lock_folder(folder: int) -> None:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # as on NFS, where only files can be locked
        pass


def is_same_file(file: TextIO, path: Path) -> bool:
    """Whether an open file is the one that stands at a path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that a reader, or a killed run, never sees half of it."""
    with whole_file(path) as file:
        file.write(text.encode())


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes an object whole, with a checksum in it."""
    text = json.dumps(sealed.seal(content), indent=2, allow_nan=False)
    write_whole(path, text + "\n")


def read_json(path: Path, keys: Collection[str] = ()) -> dict[str, Any]:
    """Reads an object that `write_json` wrote.

    Args:
      path: of the file.
      keys: that it must have.

    Raises:
      WorkdirError: something damaged it since, or it is another object.
    """
    try:
        content = sealed.parse(path.read_bytes())
    except sealed.SealError as error:
        raise WorkdirError(
            f"{path} is damaged ({error}); restore it, or choose another --workdir."
        ) from None
    if missing := [key for key in keys if key not in content]:
        raise WorkdirError(
            f"{path} lacks {', '.join(missing)}: expected that of a run of this "
            "command; restore it, or choose another --workdir."
        )
    return content


def check_same_config(
    workdir: Path, config: Mapping[str, Any], configuration: Configuration
) -> None:
    """Compares a configuration with that of the folder; where it has none, writes it.

    So it does where the run becomes longer, which is then no longer finished.

    Raises:
      WorkdirError: they differ.
    """
    path = workdir / "config.json"
    if not path.exists():
        write_json(path, config)
        return
    earlier = read_json(path)
    differences = configuration.differences(earlier, config)
    if differences:
        raise WorkdirError(
            f"{workdir} holds a run of another configuration: "
            f"{'; '.join(differences)}. Choose another --workdir, or give that "
            "configuration to go on with it."
        )
    if extension := configuration.extension(earlier, config):
        print(f"The run in {workdir} is extended: {extension}.")
        # First: it marks the shorter run as finished.
        (workdir / "summary.json").unlink(missing_ok=True)
        write_json(path, config)
