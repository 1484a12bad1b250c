"""SIGTERM: what schedulers send before they take a machine away."""

import contextlib
import itertools
import signal
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils


class PreemptedError(RuntimeError):
    """The run was asked to stop, and has saved what it needs to go on."""


@contextlib.contextmanager
def watch() -> Iterator[Callable[[], bool]]:
    """A context in which SIGTERM does not end the process, but is reported.

    Yields:
      A function that says whether to stop. All processes must call it equally often;
      they have the same answer, also when only one of them received the signal.
    """
    if jax.process_count() > 1:
        # JAX catches the signal, and finds a call that no process has passed yet.
        calls = itertools.count()
        yield lambda: multihost_utils.reached_preemption_sync_point(next(calls))
        return
    received = []
    earlier = signal.signal(signal.SIGTERM, lambda *_: received.append(True))
    try:
        yield lambda: bool(received)
    finally:
        signal.signal(signal.SIGTERM, earlier)


def raise_on_sigterm() -> None:
    """From here on SIGTERM raises `PreemptedError`, for a process that is alone."""

    def stop(*_: Any) -> None:
        raise PreemptedError("stopped by SIGTERM")

    signal.signal(signal.SIGTERM, stop)
