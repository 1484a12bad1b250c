"""A whole run of the command, with the paper's layers, killed and resumed."""

import signal
import subprocess
import sys
import time

import pytest

from experiments.checkpoints.stored import ArrayRecord, read_metadata
from tests.experiments.helpers import REPOSITORY, command_environment

pytestmark = pytest.mark.slow

RUN = (
    "--config=experiments/configs/inception.py:bn_x5,small",
    "--config.num_steps=8",
    "--config.checkpoint_every=2",
    "--config.eval_every=3",
    "--config.eval_examples=200",
    "--config.population_batches=3",
)


def start(workdir, environment) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.inception", *RUN, f"--workdir={workdir}"],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def finish(workdir, environment) -> str:
    process = start(workdir, environment)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return output.decode()


def checksums(workdir, folder) -> dict[str, ArrayRecord]:
    """CRC-32C, dtype and shape of every array of the last checkpoint."""
    return read_metadata(workdir / folder / "8").arrays


def test_killed_in_mid_run_it_ends_with_the_same_bits(tmp_path):
    # Compiling takes longer than the run.
    environment = command_environment(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "cache"))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    output = finish(whole, environment)
    assert "in the end, by population: top-1 " in output
    process = start(killed, environment)
    while process.poll() is None and not (killed / "checkpoints" / "4").exists():
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (killed / "summary.json").exists()
    assert "Going on from the checkpoint of step" in finish(killed, environment)
    for name in "metrics.jsonl", "summary.json":
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    for folder in "checkpoints", "population":
        assert checksums(killed, folder) == checksums(whole, folder)
    assert "finished; nothing to do" in finish(killed, environment)
