"""The command line as a user meets it: most tests here start processes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.inception.ensembles.tables import PAPER
from tests.experiments.helpers import REPOSITORY, command_environment, read_files
from tests.experiments.inception.ensembles.test_trained_networks import (
    change,
    contents,
    train,
)

# The command with a tiny network and data set in place of the real ones.
TINY_COMMAND = """
from experiments.inception import evaluate
from experiments.running import commands
from tests.experiments.inception.tiny_inception import TinyInception, load_tiny

def main(arguments):
    evaluate.main(arguments, TinyInception, load_tiny(broken_test=(7,)))

commands.launch_with_arguments(main, evaluate.__doc__)
"""


def run_command(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=REPOSITORY,
        env=command_environment(),
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    train(folder / "bn", flip=True)
    train(folder / "plain", "inception", flip=True)
    return folder


def test_evaluates_networks_and_their_ensemble(runs, tmp_path):
    before = contents(runs)
    output = tmp_path / "new" / "output"
    # Flags may stand anywhere.
    flags = ["--crops=10,1", "--crops=1", f"--output={output}", "--examples=20"]
    done = run_command(
        "-c", TINY_COMMAND, runs / "plain", *flags, runs / "bn", runs / "bn"
    )
    assert done.returncode == 0, done.stderr
    files = read_files(output)
    assert files.keys() == {
        *("figure4.json", "figure4.md", "figure4.png", "figure4.svg")
    }
    numbers = json.loads(files["figure4.json"])
    assert [(row["model"], row["crops"], row["models"]) for row in numbers["rows"]] == [
        *(("bn_x5", 1, 1), ("inception", 1, 1), ("ensemble", 1, 2)),
        *(("bn_x5", 10, 1), ("inception", 10, 1), ("ensemble", 10, 2)),
    ]
    statistics = [network["statistics"] for network in numbers["networks"]]
    assert statistics == ["population", None]
    assert len(numbers["paper"]) == len(PAPER)
    assert numbers["test_set"]["evaluated"] == 19
    page = files["figure4.md"].decode()
    assert page in done.stdout
    assert "1 images could not be decoded:\n  image 7 is broken\n" in done.stdout
    assert done.stdout.endswith(f"are in {output}.\n")
    assert "10 crops: 95%|" in done.stderr.replace("  ", " ")
    assert "error" not in done.stderr
    assert contents(runs) == before


def test_help():
    done = run_command("-m", "experiments.evaluate", "--help")
    assert done.returncode == 0
    assert done.stderr == ""
    assert done.stdout.startswith("Evaluates trained networks")
    for flag in ("crops", "data_dir", "statistics", "examples", "output"):
        assert f"--{flag}:" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    {
        "number": (
            ["{runs}", "--crops=1,12"],
            "--crops=1,12: expected 1, 10, 144, or several of these with commas.",
        ),
        "no number": (["{runs}", "--crops="], "--crops=: expected 1, 10, 144"),
        "statistics": (["{runs}", "--statistics=x"], "<population|moving_average>"),
        "no run": ([], "give the workdirs of runs of experiments.inception"),
        "other images": (
            ["{runs}"],
            "the runs differ in image_size (32 in {runs}/bn, 64 in {runs}/plain)",
        ),
        "output": (
            ["{runs}/bn", "--output={runs}/bn/config.json"],
            "cannot write to {runs}/bn/config.json (File exists); choose another "
            "--output.",
        ),
    }.values(),
)
def test_mistakes_are_answered_with_one_line(runs, tmp_path, arguments, expected):
    copied = shutil.copytree(runs, tmp_path / "runs")
    change(copied / "plain", image_size=64)
    before = contents(tmp_path)
    given = [argument.format(runs=copied) for argument in arguments]
    done = run_command("-c", TINY_COMMAND, *given)
    assert done.returncode == 1
    assert done.stderr.startswith("error: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert expected.format(runs=copied) in done.stderr
    assert contents(tmp_path) == before
