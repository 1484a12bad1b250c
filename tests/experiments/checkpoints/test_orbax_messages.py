"""What Orbax leaves behind is not shown, and everything else is."""

import logging
import sys

import pytest

from experiments.checkpoints.orbax_messages import _is_no_task_of_orbax


def record(message: str, file: str) -> logging.LogRecord:
    """As asyncio logs an error that was raised in a file."""
    try:
        exec(compile("raise OSError(28, 'No space left on device')", file, "exec"))
    except OSError:
        error = sys.exc_info()
    return logging.LogRecord("asyncio", logging.ERROR, "", 0, message, None, error)


FUTURE = "Future exception was never retrieved\nfuture: <Future finished exception=...>"
WRAPPED = (
    "Task exception was never retrieved\nfuture: <Task coro=<_wrap_awaitable() done, "
    "defined at /python/asyncio/tasks.py:687> exception=ValueError('DATA_LOSS: ... {}')"
)
TASK = "Task exception was never retrieved\nfuture: <Task coro=<{}.write() done ...>"


@pytest.mark.parametrize(
    ("message", "file", "shown"),
    [
        (FUTURE, "/packages/orbax/checkpoint/async_path.py", False),
        (FUTURE, "/packages/other/path.py", True),
        (TASK.format("orbax.checkpoint"), "/packages/other/path.py", False),
        (TASK.format("other"), "/packages/other/path.py", True),
        (WRAPPED.format("[tensorstore_spec="), "/python/asyncio/tasks.py", False),
        (WRAPPED.format("in OCDBT database"), "/python/asyncio/tasks.py", False),
        (WRAPPED.format("of another library"), "/python/asyncio/tasks.py", True),
        ("Executing took 0.3 seconds", "/packages/orbax/checkpoint/path.py", True),
    ],
)
def test_messages_of_asyncio(message, file, shown):
    assert _is_no_task_of_orbax(record(message, file)) == shown


def test_a_message_without_an_error():
    bare = logging.LogRecord("asyncio", logging.ERROR, "", 0, FUTURE, None, None)
    assert _is_no_task_of_orbax(bare)
