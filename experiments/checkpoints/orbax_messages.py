"""What else Orbax tells when it cannot read or write: many things beside one error.

It reads and writes many arrays at once. When one fails, it raises that error; the
others call into an event loop that is closed by then, in threads of their own, and
their errors are printed by whoever is left to notice them.
"""

import functools
import logging
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

_NAMES = ("orbax", "tensorstore", "OCDBT")  # the last is TensorStore's format of files


@functools.cache
def silence_leftovers() -> None:
    """Keeps these off the terminal; all other errors are shown as before."""
    logging.getLogger("absl").addFilter(_is_no_error_of_orbax)
    logging.getLogger("asyncio").addFilter(_is_no_task_of_orbax)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    show = sys.unraisablehook

    def show_others(unraisable: Any) -> None:
        # An event loop that could not be made, for want of files, fails once more.
        of_a_loop = getattr(unraisable.object, "__qualname__", "").startswith(
            "BaseEventLoop."
        )
        if str(unraisable.exc_value) != "Event loop is closed" and not of_a_loop:
            show(unraisable)

    sys.unraisablehook = show_others


def _is_no_error_of_orbax(record: logging.LogRecord) -> bool:
    """Leaves out the errors that Orbax logs: it raises them, too."""
    return record.levelno < logging.ERROR or not _is_of_orbax(record.pathname)


def _is_no_task_of_orbax(record: logging.LogRecord) -> bool:
    """Leaves out what nobody asked Orbax's tasks, or futures of theirs, for."""
    message = record.getMessage()
    if "exception was never retrieved" not in message:
        return True
    # A task is named in the message, a future is known by where its error comes from;
    # and where asyncio wrapped what TensorStore, below Orbax, does, by what that tells.
    _, _, trace = record.exc_info or (None, None, None)
    files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(trace)]
    named = any(name in message for name in _NAMES)
    return not named and not any(map(_is_of_orbax, files))


def _is_of_orbax(file: str) -> bool:
    return "orbax" in Path(file).parts
