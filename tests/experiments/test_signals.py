"""Signals at every moment of a real run: docs/reliability.md has the table."""

import re
import signal
import time

import pytest

from experiments.running.stopping import INTERRUPTED, TRY_AGAIN
from tests.experiments.helpers import read_files
from tests.experiments.inception.tiny_run import tiny_arguments
from tests.experiments.paused_run import PAUSED
from tests.experiments.process_group import ProcessGroup

pytestmark = pytest.mark.slow

BOUND = 30.0  # seconds, on a busy machine, from a signal to the end
CHECKPOINTS = "experiments.checkpoints.save:Checkpoints"
EXPERIMENT = "experiments.inception.experiment:Experiment"
TRAINING = "experiments.inception.training"
# Where a run is, by where in the code, and at which call of every start of it, or of
# the first, the second and the third.
MOMENTS = {
    "import": ("import", 1),
    "data": ("tests.experiments.inception.tiny_inception:TinySplit.__init__", 2),
    "opening the run": ("experiments.running.run_folder:open_workdir", 1),
    "first checkpoint, or reading one": (f"{CHECKPOINTS}.restore_newest", 1),
    "reading a checkpoint": ("experiments.checkpoints.save:read_arrays", 1),
    "first evaluation": (f"{EXPERIMENT}.evaluate", 1),
    "first step, which is compiled": (f"{EXPERIMENT}.step", 1),
    "step": (f"{EXPERIMENT}.step", 2),
    "look": ("experiments.running.loop:_Losses.look", 1),
    "evaluation": ("experiments.running.stopping:check", 3),
    "report": ("experiments.running.record:Record.report", 2, 1, 1),
    "save": (f"{CHECKPOINTS}.save", 2, 2, 1),
    "waiting for the last save": (f"{CHECKPOINTS}.close", 1),
    "population statistics": (f"{EXPERIMENT}.population_statistics", 1),
    "saving them": (f"{TRAINING}:Checkpoints.save", 5, 1, 1),
    "last evaluation": (f"{TRAINING}:_evaluate_finally", 1),
    "summary": (f"{TRAINING}:write_json", 1),
}
CODES = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: TRY_AGAIN}
RESULTS = ("metrics.jsonl", "summary.json", "config.json")


def results(workdir):
    files = read_files(workdir)
    assert not [name for name in files if name.endswith((".partial", ".tmp"))]
    return {name: files[name] for name in RESULTS}


def paused(folder, place, call, count=1):
    arguments = [place, str(call), *tiny_arguments(folder / "run")]
    return ProcessGroup(folder, count, arguments, module="tests.experiments.paused_run")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    with paused(folder, "import", 0) as group:
        (ended,) = group.wait()
    assert ended.code == 0, ended.output
    return results(folder / "run")


def stop(folder, moment, number, start=0):
    """Sends a signal at a moment; returns how the process ended."""
    place, *calls = MOMENTS[moment]
    with paused(folder, place, calls[start % len(calls)]) as group:
        # The last start may have passed the moment already.
        while start < 2 or group.processes[0].poll() is None:
            if PAUSED in group.output(0):
                group.signal(0, number)
                break
            assert start == 2 or group.processes[0].poll() is None, group.output(0)
            time.sleep(0.05)
        (ended,) = group.wait()
    return ended


def check_stopped(ended, number):
    assert ended.code == CODES[number], ended.output
    assert ended.seconds < BOUND
    assert "Traceback" not in ended.output
    (line,) = re.findall("^error: .*$", ended.output, re.MULTILINE)
    assert f"stopped by {number.name}; " in line


@pytest.mark.parametrize("moment", MOMENTS)
def test_every_signal_at_every_moment(tmp_path, undisturbed, moment):
    """Ctrl-C, then SIGTERM, then the loss of the terminal, each to a new start."""
    if moment == "reading a checkpoint":
        stop(tmp_path, "step", signal.SIGTERM)
    for start, number in enumerate(CODES):
        check_stopped(stop(tmp_path, moment, number, start), number)
    ended = stop(tmp_path, moment, signal.SIGHUP, 2)
    assert ended.code == 0, ended.output
    assert not list((tmp_path / "run").glob("checkpoints/*.damaged*"))
    assert results(tmp_path / "run") == undisturbed


@pytest.mark.parametrize("asked", [0, 1])
@pytest.mark.parametrize("moment", ["population statistics", "last evaluation"])
def test_one_of_two_processes_that_train_no_more(tmp_path, moment, asked):
    """Nothing is to be saved: it leaves, and the other one notices."""
    with paused(tmp_path, *MOMENTS[moment], count=2) as group:
        for number in (0, 1):
            group.wait_for(PAUSED, number)
        group.signal(asked, signal.SIGTERM)
        (stopped,) = group.wait(asked)
        (other,) = group.wait(1 - asked)
    check_stopped(stopped, signal.SIGTERM)
    assert "the same command goes on from step 10." in stopped.output
    assert other.seconds < BOUND
    assert other.code in (TRY_AGAIN, -signal.SIGABRT)
    with paused(tmp_path, "import", 0) as group:
        (ended,) = group.wait()
    assert ended.code == 0, ended.output
    assert (tmp_path / "run" / "summary.json").exists()


def test_a_second_sigterm_while_the_first_is_obeyed(tmp_path, undisturbed):
    with paused(tmp_path, *MOMENTS["save"][:2]) as group:
        group.wait_for(PAUSED)
        for _ in range(3):
            group.signal(0, signal.SIGTERM)
        (ended,) = group.wait()
    check_stopped(ended, signal.SIGTERM)
    with paused(tmp_path, "import", 0) as group:
        (ended,) = group.wait()
    assert ended.code == 0, ended.output
    assert results(tmp_path / "run") == undisturbed


def test_ctrl_c_twice_stops_at_once_and_loses_the_steps_since(tmp_path, undisturbed):
    with paused(tmp_path, *MOMENTS["step"]) as group:
        group.wait_for(PAUSED)
        group.signal(0, signal.SIGINT)
        group.wait_for("Ctrl-C again stops at once")
        group.signal(0, signal.SIGINT)
        (ended,) = group.wait()
    check_stopped(ended, signal.SIGINT)
    assert "the same command goes on from step 0." in ended.output
    with paused(tmp_path, "import", 0) as group:
        (ended,) = group.wait()
    assert ended.code == 0, ended.output
    assert results(tmp_path / "run") == undisturbed
