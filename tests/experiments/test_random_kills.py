"""Runs that kill -9 ends at random places, many times, and their results.

docs/reliability.md has the table of faults that these are part of.
"""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from experiments.checkpoints.stored import read_metadata, stored_steps
from tests.experiments.helpers import REPOSITORY, RESULTS, command_environment
from tests.experiments.inception.tiny_run import tiny_arguments

pytestmark = pytest.mark.slow

KILLS = 12
UNFINISHED = "*.orbax-checkpoint-tmp"


class Kind(NamedTuple):
    """A run to be killed."""

    command: list[str]  # whose last argument lacks the workdir
    last_step: int
    results: tuple[str, ...]
    folders: tuple[str, ...]  # of checkpoints


# Writing a checkpoint takes longer than the few steps between two.
KINDS = {
    "mnist": Kind(
        [
            *("experiments.mnist", "--config.hidden=(8,)", "--config.batch_size=64"),
            *("--config.num_seeds=1", "--config.num_steps=1200"),
            *("--config.eval_every=200", "--config.early_steps=0"),
            *("--config.checkpoint_every=10", "--config.probe_examples=100"),
            *("--config.population_batches=4", "--workdir="),
        ],
        1_200,
        RESULTS,
        ("checkpoints",),
    ),
    "inception": Kind(
        [
            "tests.experiments.inception.tiny_run",
            *tiny_arguments("", num_steps=400, eval_every=50, checkpoint_every=5),
        ],
        400,
        ("metrics.jsonl", "summary.json", "config.json"),
        ("checkpoints", "population"),
    ),
}


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("cache"))
    return command_environment(
        JAX_COMPILATION_CACHE_DIR=cache,
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
    )


def start(name: str, workdir: Path, environment) -> subprocess.Popen[str]:
    *command, last = KINDS[name].command
    return subprocess.Popen(
        [sys.executable, "-m", *command, f"{last}{workdir}"],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(name: str, workdir: Path, environment) -> str:
    process = start(name, workdir, environment)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return output


def assert_same_results(name: str, workdir: Path, expected: Path) -> None:
    kind = KINDS[name]
    for file in kind.results:
        assert (workdir / file).read_bytes() == (expected / file).read_bytes(), file
    for folder in kind.folders:
        # Shapes, dtypes and checksums of all arrays: the same to the last bit.
        arrays, others = (
            read_metadata(place / folder / str(kind.last_step)).arrays
            for place in (workdir, expected)
        )
        assert arrays == others


def kill_once(process: subprocess.Popen[str], folder: Path, delay: float) -> bool:
    """Kills a run some time after it began to save; whether it was still running."""
    before = stored_steps(folder)
    while process.poll() is None and stored_steps(folder) == before:
        time.sleep(0.002)
    time.sleep(delay)
    process.kill()
    process.communicate()
    return process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("name", KINDS)
def test_killed_at_random_places_it_ends_with_the_same_bits(
    name, tmp_path, environment
):
    whole = tmp_path / "whole"
    finish(name, whole, environment)
    moments = random.Random(0)
    kills, in_a_save, runs, resumed_from = 0, 0, 0, []
    while kills < KILLS:
        runs += 1
        workdir = tmp_path / f"run{runs}"
        folder = workdir / "checkpoints"
        while kills < KILLS:
            process = start(name, workdir, environment)
            if not kill_once(process, folder, moments.uniform(0, 1)):
                assert process.returncode == 0
                break
            kills += 1
            in_a_save += bool(list(folder.glob(UNFINISHED)))
            resumed_from.append(stored_steps(folder)[-1])
        else:
            output = finish(name, workdir, environment)
            assert f"from the checkpoint of step {resumed_from[-1]} in" in output
        assert_same_results(name, workdir, whole)
        assert not list(folder.glob(UNFINISHED))
    print(json.dumps({"killed at": resumed_from, "in a save": in_a_save}))
    assert in_a_save >= KILLS // 4
    assert len(set(resumed_from)) >= KILLS // 2
