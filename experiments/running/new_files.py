"""Writing files in folders where others may write, too: never through links of theirs.

A link in the place of a file would have its target overwritten.
"""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TextIO


def create(path: Path) -> IO[bytes]:
    """Opens an empty file for writing; what was there before is left to others."""
    path.unlink(missing_ok=True)
    return path.open("xb")


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file of which a reader, or a killed run, never sees half.

    It takes its name when it is on disk. After an exception, what was there remains.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with create(partial) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def open_lock(path: Path) -> TextIO:
    """Opens a file that only serves to be locked.

    It is not emptied: it may be another name of somebody's file.
    """
    return open(path, "a", opener=no_link)


def no_link(path: str, flags: int) -> int:
    """An opener of files that stay where they are: `open(path, "a", opener=no_link)`.

    Raises:
      OSError: there is a symbolic link, or something that would be waited for.
    """
    try:
        return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(
                errno.ELOOP, "it is a symbolic link; remove it", path
            ) from None
        raise
