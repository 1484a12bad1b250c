"""What befalls files, done to real runs: docs/reliability.md has the table."""

import contextlib
import itertools
import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments.checkpoints.stored import read_metadata, stored_steps
from experiments.running.stopping import FAILED
from tests.experiments.helpers import (
    REPOSITORY,
    RESULTS,
    command_environment,
    command_line,
    read_files,
)

pytestmark = pytest.mark.slow

NUM_STEPS, STEPS_PER_CHECKPOINT = 600, 20
SMALL = [
    *("--config.hidden=(8,)", "--config.batch_size=64", "--config.num_seeds=1"),
    *(f"--config.num_steps={NUM_STEPS}", "--config.eval_every=100"),
    *("--config.early_steps=0", f"--config.checkpoint_every={STEPS_PER_CHECKPOINT}"),
    *("--config.population_batches=4", "--config.probe_examples=100"),
]


def start(workdir: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command_line(*SMALL, f"--workdir={workdir}"),
        cwd=REPOSITORY,
        env=command_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(workdir: Path) -> tuple[int, str, str]:
    """Exit code, output and errors of a run to its end."""
    process = start(workdir)
    output, errors = process.communicate()
    return process.returncode, output, errors


def wait_for_checkpoints(process: subprocess.Popen[str], workdir: Path) -> None:
    while process.poll() is None and len(stored_steps(workdir / "checkpoints")) < 2:
        time.sleep(0.002)


def error_line(errors: str) -> str:
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in errors, errors
    return line


def read_results(workdir: Path) -> list[object]:
    last = workdir / "checkpoints" / str(NUM_STEPS)
    files = [(workdir / name).read_bytes() for name in RESULTS]
    return [*files, read_metadata(last).arrays]


def assert_goes_on(workdir: Path, undisturbed: Path, step: int) -> str:
    code, output, errors = run(workdir)
    assert code == 0, errors
    assert f"Going on from the checkpoint of step {step} in" in output
    assert read_results(workdir) == read_results(undisturbed)
    return output


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    code, _, errors = run(workdir)
    assert code == 0, errors
    return workdir


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    """The workdir of a run that was killed in its middle; not to be changed."""
    workdir = tmp_path_factory.mktemp("killed") / "run"
    process = start(workdir)
    wait_for_checkpoints(process, workdir)
    process.kill()
    process.communicate()
    assert stored_steps(workdir / "checkpoints")[-1] < NUM_STEPS
    return workdir


class Disk:
    """A small file system of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def change(self, options: str) -> None:
        subprocess.run(
            ["mount", "-o", f"remount,{options}", str(self.folder)], check=True
        )

    def fill(self) -> None:
        with contextlib.suppress(OSError), (self.folder / "filler").open("wb", 0) as f:
            for size in (65536, 4096):
                with contextlib.suppress(OSError):
                    for _ in itertools.repeat(None):
                        f.write(bytes(size))


@pytest.fixture
def disk(tmp_path) -> Iterator[Disk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    yield Disk(folder)
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("repetition", range(3))
def test_a_full_disk(disk, undisturbed, repetition):
    """In the middle of a run; given space again, it goes on."""
    workdir = disk.folder / "run"
    process = start(workdir)
    wait_for_checkpoints(process, workdir)
    time.sleep(random.Random(repetition).uniform(0, 0.5))
    disk.fill()
    _, errors = process.communicate()
    assert process.returncode == FAILED
    line = error_line(errors)
    assert "No space left on device" in line or "RESOURCE_EXHAUSTED" in line
    assert "goes on from" in line
    (disk.folder / "filler").unlink()
    step = stored_steps(workdir / "checkpoints")[-1]
    assert 0 < step < NUM_STEPS
    assert_goes_on(workdir, undisturbed, step)


def test_a_file_too_large_for_its_limit(killed, undisturbed, tmp_path):
    """As a quota: no file may be larger than 2 KB, but what is open goes on."""
    workdir = shutil.copytree(killed, tmp_path / "run")
    step = stored_steps(workdir / "checkpoints")[-1]
    limited = subprocess.run(
        [
            "sh",
            "-c",
            'ulimit -f 4; exec "$@"',
            "sh",
            *command_line(*SMALL, f"--workdir={workdir}"),
        ],
        cwd=REPOSITORY,
        env=command_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert limited.returncode == FAILED
    assert "File too large" in error_line(limited.stderr)
    assert stored_steps(workdir / "checkpoints")[-1] == step
    assert_goes_on(workdir, undisturbed, step)


def test_a_read_only_workdir(disk, killed, undisturbed):
    workdir = shutil.copytree(killed, disk.folder / "run")
    step = stored_steps(workdir / "checkpoints")[-1]
    before = read_files(workdir)
    disk.change("ro")
    for place in workdir, disk.folder / "new":
        code, _, errors = run(place)
        assert code == FAILED
        line = error_line(errors)
        assert f"cannot write to the workdir {place} (Read-only file system)" in line
    assert read_files(workdir) == before
    disk.change("rw")
    assert_goes_on(workdir, undisturbed, step)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_workdir_without_permission(killed, tmp_path):
    workdir = shutil.copytree(killed, tmp_path / "run")
    workdir.chmod(0o500)
    code, _, errors = run(workdir)
    workdir.chmod(0o700)
    assert code == FAILED
    assert "cannot write to the workdir" in error_line(errors)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "flipped": flip,
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "deleted": Path.unlink,
}


@pytest.mark.parametrize("item", ["params", "opt_state", "metadata"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file(killed, undisturbed, tmp_path, damage, item):
    """Of the newest checkpoint: the largest, which holds values."""
    workdir = shutil.copytree(killed, tmp_path / "run")
    before, newest = stored_steps(workdir / "checkpoints")
    folder = workdir / "checkpoints" / str(newest)
    pattern = "metadata" if item == "metadata" else "d/*"
    files = sorted((folder / item).glob(pattern), key=lambda path: path.stat().st_size)
    DAMAGE[damage](files[-1])
    damaged = read_files(folder)
    output = assert_goes_on(workdir, undisturbed, before)
    assert f"Checkpoint {folder} is damaged ({item} " in output
    assert f"is now {newest}.damaged, and left out." in output
    assert read_files(folder.with_name(f"{newest}.damaged")) == damaged


def test_no_sound_checkpoint(killed, tmp_path):
    """Nothing is thrown away without being asked: a person decides."""
    workdir = shutil.copytree(killed, tmp_path / "run")
    for step in stored_steps(workdir / "checkpoints"):
        (workdir / "checkpoints" / str(step) / "metadata" / "metadata").unlink()
    before = read_files(workdir)
    code, _, errors = run(workdir)
    assert code == FAILED
    assert "no checkpoint in" in error_line(errors)
    assert read_files(workdir) == before
