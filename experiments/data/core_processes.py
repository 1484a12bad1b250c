"""Processes that share work on files: one a core, which end with the one that asked."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import parent_process
from typing import Any


def all_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0))


@contextlib.contextmanager
def core_processes(most: int) -> Iterator[ProcessPoolExecutor]:
    """Starts them; when it is left, what has not begun by then is given up.

    Args:
      most: how many there may be.
    """
    # A fork of a process with threads, which libraries start, may hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        max(1, min(all_cores(), most)), context, initializer=leave_signals_to_parent
    )
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def leave_signals_to_parent() -> None:
    """Lets this process end when its parent does, and not before.

    Ctrl-C reaches all processes of a terminal, a scheduler's SIGTERM all of a job: the
    parent decides what they mean.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)
