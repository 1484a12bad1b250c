"""In processes of their own: signals are for a whole process."""

import signal
import subprocess
import sys
import time

import pytest

from experiments.running.stopping import INTERRUPTED, TRY_AGAIN
from tests.experiments.helpers import REPOSITORY

BOUND = 10.0
START = """
import sys, time
from experiments.running import stopping
stopping.begin()
def wait():
    print("ready", flush=True)
    for _ in range(100):
        time.sleep(0.1)
def hold():
    print("ready", flush=True)
    while not stopping.is_asked():
        time.sleep(0.01)
    time.sleep(0.3)
"""
# In native code that never returns to Python, as a long compilation.
BUSY = "print('ready', flush=True)\nimport re\nimport numpy as np\n" + (
    "a = np.ones((1500, 1500))\nfor _ in range(10_000): a @ a"
)
HELD = """
with stopping.held():
    hold()
    print("finished", flush=True)
print("never")
"""


def run(code, *signals, pause=0.0):
    process = subprocess.Popen(
        [sys.executable, "-c", START + code],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    began = time.monotonic()
    for number in signals:
        process.send_signal(number)
        time.sleep(pause)
    out, err = process.communicate(timeout=60)
    assert time.monotonic() - began < BOUND
    return process.returncode, out, err


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, TRY_AGAIN), (signal.SIGINT, INTERRUPTED)]
)
class TestSignals:
    @pytest.mark.parametrize("work", ["wait()", BUSY], ids=["python", "native"])
    def test_ends_the_process_at_once(self, number, code, work):
        expected = f"error: stopped by {number.name}; there was nothing to save yet.\n"
        assert run(work, number) == (code, "", expected)

    def test_no_except_takes_it(self, number, code):
        work = "try:\n    wait()\nexcept BaseException:\n    print('taken')"
        assert run(work, number)[:2] == (code, "")

    def test_what_is_held_is_finished(self, number, code):
        found, out, err = run(HELD, number)
        assert found == code
        assert out.splitlines()[-1] == "finished"
        assert err.startswith(f"error: stopped by {number.name}; ")

    def test_what_remains_is_said(self, number, code):
        work = "stopping.set_what_remains(lambda: 'go on')\nwait()"
        assert run(work, number)[2] == f"error: stopped by {number.name}; go on.\n"

    def test_an_error_in_what_is_held_comes_first(self, number, code):
        work = "with stopping.held():\n    hold()\n    raise KeyError('a defect')"
        found, _, err = run(work, number)
        assert found == 1
        assert err.endswith("KeyError: 'a defect'\n")


def test_a_second_sigterm_changes_nothing():
    found, out, _ = run(HELD, signal.SIGTERM, signal.SIGTERM, pause=0.1)
    assert (found, out) == (TRY_AGAIN, "finished\n")


def test_a_second_ctrl_c_stops_at_once():
    work = "with stopping.held():\n    wait()"
    found, out, err = run(work, signal.SIGINT, signal.SIGINT, pause=0.2)
    assert found == INTERRUPTED
    assert "Interrupted: what is under way is finished and saved. Ctrl-C again" in out
    assert err == "error: stopped by SIGINT; there was nothing to save yet.\n"


def test_the_loss_of_the_terminal_ends_nothing():
    found, out, err = run("print('ready', flush=True); time.sleep(1)", signal.SIGHUP)
    assert (found, out, err) == (0, "", "")


def test_nested_holds_end_with_the_outer_one():
    work = "with stopping.held():\n    with stopping.held():\n        hold()\n"
    work += "    print('finished', flush=True)\nprint('never')"
    assert run(work, signal.SIGTERM)[:2] == (TRY_AGAIN, "finished\n")


def test_long_work_can_be_given_up():
    work = """
with stopping.held():
    try:
        with stopping.interruptible(stopping.is_asked):
            print("ready", flush=True)
            while True:
                stopping.check()
    except stopping.Stopped as error:
        print(error.code)
        stopping.check()
        print("not in here", flush=True)
"""
    assert run(work, signal.SIGTERM)[1] == f"{TRY_AGAIN}\nnot in here\n"


def test_nobody_reads_what_is_printed():
    """A pipe that is full: the process ends nevertheless."""
    work = """
import threading
def fill():
    while True:
        sys.stdout.write("x" * 10_000)
threading.Thread(target=fill, daemon=True).start()
print("ready", flush=True)
time.sleep(60)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", START + work],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(BOUND) == TRY_AGAIN
    finally:
        process.kill()
        process.stdout.close()


def test_commands_that_have_something_to_clear_away():
    work = """
stopping.raise_on_sigterm()
try:
    wait()
except Exception:
    print("taken")
except stopping.Stopped as error:
    sys.exit(error.code)
"""
    assert run(work, signal.SIGTERM)[:2] == (TRY_AGAIN, "")
