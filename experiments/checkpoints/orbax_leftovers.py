"""What else Orbax tells when it cannot read or write: many things beside one error.

It reads and writes many arrays at once. When one fails, it raises that error; the
others call into an event loop that is closed by then, in threads of their own, and
their errors are printed by whoever is left to notice them.
"""

import functools
import logging
import sys
from pathlib import Path
from typing import Any


@functools.cache
def silence_leftovers() -> None:
    """Keeps these off the terminal; all other errors are shown as before."""
    logging.getLogger("absl").addFilter(_is_no_error_of_orbax)
    logging.getLogger("asyncio").addFilter(_is_no_task_of_orbax)
    show = sys.unraisablehook

    def show_others(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            show(unraisable)

    sys.unraisablehook = show_others


def _is_no_error_of_orbax(record: logging.LogRecord) -> bool:
    """Leaves out the errors that Orbax logs: it raises them, too."""
    return record.levelno < logging.ERROR or "orbax" not in Path(record.pathname).parts


def _is_no_task_of_orbax(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return "exception was never retrieved" not in message or "orbax" not in message
