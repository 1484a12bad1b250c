"""SIGTERM: what schedulers send before they take a machine away."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils


class PreemptedError(RuntimeError):
    """The run was asked to stop, and has saved what it needs to go on."""


@contextlib.contextmanager
def watch(first_step: int) -> Iterator[Callable[[int], bool]]:
    """A context in which SIGTERM does not end the process, but is reported.

    Args:
      first_step: steps done before.

    Yields:
      A function that says, after more steps, whether to stop; its argument is the
      number of steps done. All processes must call it with the same numbers; they have
      the same answer, also when only one of them received the signal.
    """
    if jax.process_count() > 1:
        asked = first_step

        def must_stop(step: int) -> bool:
            nonlocal asked
            # JAX catches the signal, and finds a number that no process has asked for
            # yet. Every one is asked for, since Orbax asks for the steps it saves.
            numbers = range(asked + 1, step + 1)
            asked = step
            return any(
                [multihost_utils.reached_preemption_sync_point(n) for n in numbers]
            )

        yield must_stop
        return
    received = []
    earlier = signal.signal(signal.SIGTERM, lambda *_: received.append(True))
    try:
        yield lambda step: bool(received)
    finally:
        signal.signal(signal.SIGTERM, earlier)


def raise_on_sigterm() -> None:
    """From here on SIGTERM raises `PreemptedError`, for a process that is alone."""

    def stop(*_: Any) -> None:
        raise PreemptedError("stopped by SIGTERM")

    signal.signal(signal.SIGTERM, stop)
