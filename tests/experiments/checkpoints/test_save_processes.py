"""Checkpoints of several real processes: every test here starts some."""

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments.checkpoints.stored import read_metadata, stored_steps
from tests.experiments.helpers import REPOSITORY, command_environment


def run_processes(number: int, folder: Path, action: str, devices: int = 1) -> Any:
    """What every process printed, which must be the same; and the first one's output.

    Args:
      number: of processes.
      folder: of the checkpoints.
      action: as `checkpoint_process` describes it.
      devices: of each process.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = command_environment(
        XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.experiments.checkpoints.checkpoint_process"]
            + [str(part) for part in (number, process, port, folder, action)],
            cwd=REPOSITORY,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(number)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
    results = [output.splitlines()[-1] for output, _ in outputs]
    assert len(set(results)) == 1, results
    return json.loads(results[0]), outputs[0][0]


@pytest.fixture(scope="module")
def saved_by_two(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("processes") / "checkpoints"
    result, _ = run_processes(2, folder, "save")
    assert result is None
    assert stored_steps(folder) == [2, 3]
    assert read_metadata(folder / "3").provenance["processes"] == 2
    assert read_metadata(folder / "3").provenance["devices"] == 2
    return folder


@pytest.mark.parametrize(
    ("processes", "devices"),
    [(1, 3), *(pytest.param(*n, marks=pytest.mark.slow) for n in [(2, 2), (4, 1)])],
)
def test_restored_by_any_number(saved_by_two, processes, devices):
    found, _ = run_processes(processes, saved_by_two, "restore", devices)
    assert found == {"step": 3, "values": [3.0], "devices": processes * devices}


def test_damage_that_one_process_sees_counts_for_all(saved_by_two, tmp_path):
    folder = shutil.copytree(saved_by_two, tmp_path / "copy")
    found, output = run_processes(2, folder, "damage")
    assert found == {"step": 2, "values": [2.0], "devices": 2}
    assert f"Checkpoint {folder / '3'} is damaged (a bad cable), is now" in output
    # The damaged one was saved again, beside what was set aside.
    assert {path.name for path in folder.iterdir()} == {"2", "3", "3.damaged"}


@pytest.mark.slow
def test_a_folder_that_is_not_shared(saved_by_two, tmp_path):
    folder = shutil.copytree(saved_by_two, tmp_path / "copy")
    found, _ = run_processes(2, folder, "elsewhere")
    assert found["error"].startswith("process 1 does not see ")
    assert {path.name for path in folder.iterdir()} == {"2", "3"}
