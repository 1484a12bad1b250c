"""Standard output and error, whose loss no run minds."""

import codecs
import contextlib
import io
import os
import sys
from typing import Any, TextIO

# What terminals of other encodings are shown in place of what they lack.
PLAIN = {"±": "+-", "—": "-", "…": "...", "→": "->", "─": "-", "│": "|"}
PLAIN |= dict.fromkeys("├└", "`")


def protect() -> None:
    """Makes writing to them never fail; for a command's start.

    A closed pipe, a full disk and a terminal that is gone lose what is written there,
    and nothing else. What an encoding lacks is written in other characters.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            # Else the next file that is opened would be standard error.
            os.open(os.devnull, os.O_RDWR)
    codecs.register_error("plain", _in_plain_characters)
    sys.stdout = _stream(1, sys.stdout)
    sys.stderr = _stream(2, sys.stderr)


def _stream(descriptor: int, before: TextIO | None) -> io.TextIOWrapper:
    if before is not None:
        with contextlib.suppress(OSError):
            before.flush()
    encoding = getattr(before, "encoding", None) or "utf-8"
    raw = _Lossy(descriptor, "w", closefd=False)
    # Unbuffered where Python's own would be: an error comes after what was before it.
    at_once = descriptor == 2 or raw.isatty() or "PYTHONUNBUFFERED" in os.environ
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=encoding,
        errors="plain",
        line_buffering=at_once,
        write_through=at_once,
    )


class _Lossy(io.FileIO):
    """A file into which everything seems to go."""

    def write(self, content: Any, /) -> int:
        try:
            return super().write(content) or len(content)
        except OSError:
            return len(content)


def _in_plain_characters(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(PLAIN.get(character, "?") for character in lacking), error.end
