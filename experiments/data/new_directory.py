"""A directory that is written whole, by one process, or not at all."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from experiments.data.errors import DataError
from experiments.running.new_files import open_lock


@contextlib.contextmanager
def temporary_directory(path: Path, name: str) -> Iterator[None]:
    """Keeps other processes from a directory that is new, and deleted in the end.

    Args:
      path: the directory, which the caller makes; its parent must exist. What an
        earlier process that was killed left there is deleted.
      name: of the data set, for messages.

    Raises:
      DataError: another process is at work there.
    """
    with alone(path, name):
        clear(path)
        try:
            yield
        finally:
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def alone(path: Path, name: str) -> Iterator[None]:
    """Keeps other processes from a directory, whose parent must exist.

    Raises:
      DataError: another process is at work there.
    """
    with open_lock(path.with_name(".lock")) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"another process is preparing {name} in {path.parent}; wait for "
                "it, or choose another --data_dir"
            ) from None
        yield


def clear(path: Path) -> None:
    """Deletes a directory, if there is one.

    Raises:
      DataError: there is something that does not go.
    """
    shutil.rmtree(path, ignore_errors=True)
    if os.path.lexists(path):
        raise DataError(f"{path} is in the way; remove it")
