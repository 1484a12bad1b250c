"""Whole runs of the command, killed, interrupted, and in full."""

import json
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.checkpoints.stored import ArrayRecord, read_metadata
from tests.experiments.helpers import (
    REPOSITORY,
    command_environment,
    command_line,
    run_command,
)

pytestmark = pytest.mark.slow

RUN = ("--config.num_steps=3000", "--config.checkpoint_every=500")
RESULTS = ("metrics.jsonl", "percentiles.jsonl", "summary.json")


def start(workdir: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command_line(*RUN, f"--workdir={workdir}"),
        cwd=REPOSITORY,
        env=command_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def wait_until(ready: Callable[[], object], process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None and not ready():
        time.sleep(0.002)


def finish(workdir: Path) -> None:
    done = run_command(*RUN, f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr


def final_checksums(workdir: Path) -> dict[str, ArrayRecord]:
    """CRC-32C, dtype and shape of every array of the last checkpoint."""
    return read_metadata(workdir / "checkpoints" / "3000").arrays


def assert_same_results(workdir: Path, expected: Path) -> None:
    for name in RESULTS:
        assert (workdir / name).read_bytes() == (expected / name).read_bytes(), name
    assert final_checksums(workdir) == final_checksums(expected)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("uninterrupted")
    finish(workdir)
    return workdir


def test_killed_at_any_moment_it_ends_with_the_same_bits(tmp_path, uninterrupted):
    moments = random.Random(0)

    def unfinished_checkpoints() -> list[Path]:
        return list(tmp_path.glob("checkpoints/*.orbax-checkpoint-tmp"))

    def finished_checkpoints() -> set[str]:
        return {path.name for path in tmp_path.glob("checkpoints/*[0-9]")}

    def kill(ready: Callable[[], object], delay: float) -> bool:
        process = start(tmp_path)
        wait_until(ready, process)
        time.sleep(delay)
        process.kill()
        process.communicate()
        return process.returncode == -signal.SIGKILL

    killed = [
        kill(lambda: True, moments.uniform(0.1, 1)),
        kill(lambda: (tmp_path / "config.json").exists(), 0),
        kill((tmp_path / "checkpoints" / "500").exists, moments.uniform(0, 1)),
    ]
    known = len(unfinished_checkpoints())
    killed.append(kill(lambda: len(unfinished_checkpoints()) > known, 0))
    for _ in range(3):
        # Soon after the next checkpoint, so that every start gets somewhere.
        before = finished_checkpoints()
        killed.append(
            kill(
                lambda before=before: finished_checkpoints() - before,
                moments.uniform(0, 0.3),
            )
        )
    assert sum(killed) >= 5
    finish(tmp_path)
    assert_same_results(tmp_path, uninterrupted)


def test_the_default_run_reaches_the_numbers(tmp_path):
    done = run_command(f"--workdir={tmp_path}")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    (without,), (with_norm,) = (
        summary["networks"][name] for name in ("baseline", "batch_norm")
    )
    for statistics in "moving_average", "population":
        at_end = [
            entry["accuracy"]["50000"][statistics]["mean"]
            for entry in (without, with_norm)
        ]
        assert at_end[0] >= 96.5
        assert at_end[1] >= 97.4
        for step in "1000", "10000", "50000":
            ahead, behind = (
                entry["accuracy"][step][statistics]["mean"]
                for entry in (with_norm, without)
            )
            assert ahead > behind
    # Figure 1 (b, c): medians of the sigmoids' inputs drift without BN, and stay with.
    travel, travel_with_norm = (
        entry["sigmoid_input"]["travel"]["50"]["mean"] for entry in (without, with_norm)
    )
    assert travel > 2 * travel_with_norm
