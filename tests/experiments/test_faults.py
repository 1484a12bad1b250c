"""Faults of whole processes, done to real runs: docs/reliability.md has the table."""

import re
import signal
import time

import pytest

from experiments.running.stopping import FAILED, TRY_AGAIN
from tests.experiments.helpers import RESULTS
from tests.experiments.process_group import Ended, ProcessGroup

pytestmark = pytest.mark.slow

ABORTED = -signal.SIGABRT  # how JAX's runtime ends a process that has lost the others
BOUND = 30.0  # seconds after a fault in which every process has ended
NUM_STEPS = 100
STEPS_PER_CHECKPOINT = 20
FAULT = 40  # the step before which the fault comes, as a checkpoint is being written
SMALL = [
    *("--config.hidden=(8,)", "--config.batch_size=64", "--config.num_seeds=1"),
    *(f"--config.num_steps={NUM_STEPS}", "--config.eval_every=20"),
    *("--config.early_steps=0", f"--config.checkpoint_every={STEPS_PER_CHECKPOINT}"),
    *("--config.population_batches=4", "--config.probe_examples=100"),
]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The files of a run of two processes that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with ProcessGroup(folder, 2, [*SMALL, f"--workdir={folder / 'run'}"]) as group:
        for ended in group.wait():
            assert ended.code == 0, ended.output
    return read_results(folder / "run")


def read_results(workdir):
    return {name: (workdir / name).read_bytes() for name in RESULTS}


def one_line(ended: Ended) -> str:
    """The message of a process that ended with an error."""
    (line,) = re.findall(r"^error: .*$", ended.output, re.MULTILINE)
    assert "Traceback" not in ended.output
    return line


def disturbed(folder, fault, step=FAULT, faulty=1, count=2, **options):
    arguments = [*SMALL, f"--workdir={folder / 'run'}"]
    return ProcessGroup(
        folder, count, arguments, fault=(str(faulty), fault, str(step)), **options
    )


def assert_goes_on(folder, undisturbed, step=None, count=2):
    """The same command goes on, and ends with the same numbers.

    Without a step, from the checkpoint of the fault or the one before: what a fault
    interrupts, it does not damage.
    """
    arguments = [*SMALL, f"--workdir={folder / 'run'}"]
    with ProcessGroup(folder, count, arguments) as group:
        first, *others = group.wait()
    assert first.code == 0, first.output
    assert all(ended.code == 0 for ended in others)
    (resumed,) = re.findall(r"from the checkpoint of step (\d+)", first.output)
    wanted = {FAULT, FAULT - STEPS_PER_CHECKPOINT} if step is None else {step}
    assert int(resumed) in wanted
    assert read_results(folder / "run") == undisturbed


def assert_lost(survivor, message, code):
    """It ended with a message, whichever noticed first: its step, or JAX's runtime."""
    if survivor.code == ABORTED:
        assert "JAX distributed service detected fatal errors" in survivor.output
        assert "another task died" in survivor.output
    else:
        assert survivor.code == code
        assert message in one_line(survivor)


@pytest.mark.parametrize("faulty", [0, 1])
def test_a_process_is_killed(tmp_path, undisturbed, faulty):
    """Number 0 is the coordinator too."""
    with disturbed(tmp_path, "kill", faulty=faulty) as group:
        (killed,) = group.wait(faulty)
        (survivor,) = group.wait(1 - faulty)
    assert killed.code == -signal.SIGKILL
    assert survivor.seconds - killed.seconds < BOUND
    assert_lost(survivor, "lost contact with another process", TRY_AGAIN)
    assert_goes_on(tmp_path, undisturbed)


@pytest.mark.parametrize("faulty", [0, 1])
def test_an_exception_in_one_process(tmp_path, undisturbed, faulty):
    with disturbed(tmp_path, "raise", faulty=faulty) as group:
        (failed,) = group.wait(faulty)
        (survivor,) = group.wait(1 - faulty)
    assert failed.code == FAILED
    assert "RuntimeError: a defect that nobody expected" in failed.output
    assert survivor.seconds - failed.seconds < BOUND
    message = f"process {faulty} failed: a defect that nobody expected"
    assert_lost(survivor, message, FAILED)
    assert_goes_on(tmp_path, undisturbed)


def test_a_process_that_falls_silent(tmp_path, undisturbed):
    # As a machine that hangs: it keeps its connections.
    with disturbed(tmp_path, "stop") as group:
        group.wait_for("fault at step", 1)
        group.signal(1, signal.SIGSTOP)
        (survivor,) = group.wait(0)
    assert survivor.seconds < BOUND
    assert survivor.code == ABORTED
    assert "stopped sending heartbeats" in survivor.output
    assert_goes_on(tmp_path, undisturbed)


@pytest.mark.parametrize("present", [0, 1])
def test_a_process_that_never_comes(tmp_path, present):
    arguments = [*SMALL, f"--workdir={tmp_path / 'run'}", "--start_seconds=5"]
    with ProcessGroup(tmp_path, 2, arguments, present=[present]) as group:
        (waiting,) = group.wait()
    assert waiting.seconds < BOUND
    assert f"Process {present} of 2 waits up to 5 s" in waiting.output
    assert waiting.code == ABORTED
    assert "DEADLINE_EXCEEDED" in waiting.output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("faulty", [0, 1])
def test_sigterm_to_one_of_two_processes(tmp_path, undisturbed, faulty):
    with disturbed(tmp_path, "terminate", faulty=faulty) as group:
        ended = list(group.wait())
    steps = set()
    for process in ended:
        assert process.code == TRY_AGAIN
        message = one_line(process)
        assert "stopped by SIGTERM; the same command goes on from step" in message
        steps |= set(re.findall(r"from step (\d+)", message))
    # All stopped at one step, with nothing lost.
    (step,) = steps
    assert int(step) > FAULT
    assert_goes_on(tmp_path, undisturbed, int(step))


@pytest.mark.parametrize("silent", [0, 1])
def test_sigterm_while_processes_connect(tmp_path, silent):
    arguments = [*SMALL, f"--workdir={tmp_path / 'run'}"]
    with ProcessGroup(tmp_path, 2, arguments, present=[1 - silent]) as group:
        group.wait_for("waits up to", 1 - silent)
        time.sleep(0.5)
        group.signal(1 - silent, signal.SIGTERM)
        (stopped,) = group.wait()
    assert stopped.code == TRY_AGAIN
    assert "stopped by SIGTERM; there was nothing to save yet." in one_line(stopped)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("variables", "arguments", "message"),
    [
        ({}, ["--config.dry_run=True"], "dry_run=True (False in process 0)"),
        ({}, ["--config.first_seed=3"], "first_seed=3 (0 in process 0)"),
        (
            {"JAX_DEFAULT_PRNG_IMPL": "rbg"},
            [],
            "jax_default_prng_impl=rbg (threefry2x32 in process 0)",
        ),
        (
            {"JAX_THREEFRY_PARTITIONABLE": "0"},
            [],
            "jax_threefry_partitionable=False (True in process 0)",
        ),
    ],
)
def test_processes_that_were_started_differently(
    tmp_path, variables, arguments, message
):
    with ProcessGroup(
        tmp_path,
        2,
        [*SMALL, f"--workdir={tmp_path / 'run'}"],
        of_the_last=(variables, arguments),
    ) as group:
        for process in group.wait():
            assert process.code == FAILED
            assert message in one_line(process)
            assert process.seconds < BOUND
    assert not (tmp_path / "run").exists()


def test_a_workdir_that_is_in_use(tmp_path):
    """All processes of the second run end with a line that says so."""
    arguments = [*SMALL, f"--workdir={tmp_path / 'run'}"]
    with disturbed(tmp_path, "sleep", step=0, faulty=0) as group:
        group.wait_for("fault at step")
        with ProcessGroup(tmp_path, 2, arguments, devices=2) as second:
            ended = list(second.wait())
        for process in group.wait():
            assert process.code == 0
    for process in ended:
        assert process.code == FAILED
        assert "another process is writing to" in one_line(process)


def test_a_workdir_that_not_all_processes_see(tmp_path):
    with ProcessGroup(
        tmp_path,
        2,
        [*SMALL, "--workdir=run"],
        folders=[tmp_path / "one", tmp_path / "other"],
    ) as group:
        ended = list(group.wait())
    for process in ended:
        assert process.code == FAILED
        assert "give all processes one --workdir" in one_line(process)
    assert "error: process 1: " in one_line(ended[0])
