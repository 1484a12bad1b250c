"""Signals that end a run: a scheduler's SIGTERM, and Ctrl-C.

A thread of its own waits for them. Python's own way, a function that the main thread
calls between two of its instructions, comes late while XLA compiles, and an exception
that it raises can come up anywhere: in a callback that swallows it, or where it is
taken for a damaged file. So a signal ends the process at once, as kill -9 would and as
the files of a run withstand, except where `held` says that something is to be finished.
Whoever finishes it asks `is_asked`.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn

# Exit codes, beside 0. A scheduler may start a command again that ended with the
# second, which is EX_TEMPFAIL of sysexits.h; the third is what shells give to a process
# that SIGINT ended.
FAILED, TRY_AGAIN, INTERRUPTED = 1, 75, 130
SECONDS_TO_SPEAK = 2.0
_CODES = {signal.SIGTERM: TRY_AGAIN, signal.SIGINT: INTERRUPTED}
# What is lost with a terminal is the terminal: the run goes on.
_IGNORED = (signal.SIGHUP,)


class Stopped(BaseException):
    """The run was asked to stop, and has saved what it needs to go on.

    No `Exception`: nothing that handles faults may take it for one.
    """

    def __init__(self, code: int, message: str) -> None:
        """Says how to end.

        Args:
          code: for the shell.
          message: for the user.
        """
        super().__init__(message)
        self.code = code


class _Signals:
    """What has come, and what is being finished."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.asked: int | None = None  # the first signal
        self.interrupts = 0
        self.holds = 0
        self.interrupt: Callable[[], bool] | None = None
        self.what_remains: Callable[[], str] = lambda: "there was nothing to save yet"

    def receive(self, number: int) -> None:
        with self.lock:
            self.asked = self.asked or number
            self.interrupts += number == signal.SIGINT
            if not self.holds or self.interrupts > 1:
                leave(_CODES[signal.Signals(number)], self.message())
        # Not with the lock, for which a run would wait if nobody read the terminal.
        if number == signal.SIGINT:
            print(
                "\nInterrupted: what is under way is finished and saved. Ctrl-C again "
                "stops at once.",
                flush=True,
            )

    def message(self) -> str:
        by = signal.Signals(self.asked or signal.SIGTERM).name
        return f"stopped by {by}; {self.what_remains()}."


_signals = _Signals()


def begin() -> None:
    """From here on signals are received as this module says; for a command's start."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in (*_CODES, *_IGNORED):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda *_: None)

    def serve() -> None:
        while True:
            for number in os.read(reader, 64):
                if number in _CODES:
                    _signals.receive(number)

    threading.Thread(target=serve, name="signals", daemon=True).start()


def raise_on_sigterm() -> None:
    """From here on SIGTERM raises `Stopped`, as Ctrl-C raises KeyboardInterrupt.

    For the start of a command that has something to clear away.
    """

    def stop(*_: object) -> None:
        raise Stopped(TRY_AGAIN, "stopped by SIGTERM; the same command starts again.")

    signal.signal(signal.SIGTERM, stop)


def set_what_remains(describe: Callable[[], str]) -> None:
    """Names what says, to the user of a stopped run, what a new start finds."""
    _signals.what_remains = describe


def is_asked() -> bool:
    """Whether this process was asked to stop."""
    return _signals.asked is not None


def stopped() -> Stopped:
    """What to raise when all is saved, in a process that may not have been asked."""
    number = _signals.asked or signal.SIGTERM
    return Stopped(_CODES[signal.Signals(number)], _signals.message())


@contextlib.contextmanager
def interruptible(is_asked: Callable[[], bool]) -> Iterator[None]:
    """What is inside may be given up at its `check`s, for something that is held.

    Args:
      is_asked: whether to; of several processes each must have the same answer.
    """
    _signals.interrupt = is_asked
    try:
        yield
    finally:
        _signals.interrupt = None


def check() -> None:
    """To be called often in long work that can be done again.

    Raises:
      Stopped: the work is to be given up.
    """
    if _signals.interrupt is not None and _signals.interrupt():
        raise stopped()


@contextlib.contextmanager
def held() -> Iterator[None]:
    """What is inside is finished first; a signal that came meanwhile ends it then.

    After an error, or `Stopped`, it is for whoever catches that to end the process.
    """
    with _signals.lock:
        _signals.holds += 1
    try:
        yield
    except BaseException:
        with _signals.lock:
            _signals.holds -= 1
        raise
    with _signals.lock:
        _signals.holds -= 1
        if not _signals.holds and _signals.asked is not None:
            leave(_CODES[signal.Signals(_signals.asked)], _signals.message())


def say(message: str) -> None:
    """Tells the user why the process ends, on one line."""
    if message:
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()


def leave(code: int, message: str = "") -> NoReturn:
    """Ends this process at once.

    Nothing is torn down: threads of XLA that are still at work would then read what is
    no more, and a segmentation fault would hide the exit code.

    Args:
      code: for the shell.
      message: for the user, on one line.
    """
    # Another thread may be in the middle of writing there, for ever if nobody reads.
    with contextlib.suppress(RuntimeError):
        speaker = threading.Thread(target=say, args=(message,), daemon=True)
        speaker.start()
        speaker.join(SECONDS_TO_SPEAK)
    os._exit(code)
