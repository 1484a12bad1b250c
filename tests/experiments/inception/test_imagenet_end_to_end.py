"""From ImageNet's archives to figures 2, 3 and 4, by the commands that a user types."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.experiments.data.imagenet_shaped import make_archives, make_imagenet
from tests.experiments.helpers import REPOSITORY, command_environment

pytestmark = pytest.mark.slow

CONFIG = "--config=experiments/configs/inception.py"
TINY = (
    *("--config.image_size=32", "--config.width=0.0625", "--config.batch_size=8"),
    *("--config.num_steps=30", "--config.eval_every=10", "--config.eval_batch_size=8"),
    *("--config.checkpoint_every=5", "--config.population_batches=3"),
    *("--config.workers=2", "--config.learning_rate=0.001"),
)


def command(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"experiments.{module}", *arguments]


def run(module: str, *arguments: str) -> str:
    """What the command prints."""
    done = subprocess.run(
        command(module, *arguments),
        cwd=REPOSITORY,
        env=command_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def train(variant: str, data_dir: Path, workdir: Path, *arguments: str) -> list[str]:
    return [
        "inception",
        f"{CONFIG}:{variant}",
        f"--data_dir={data_dir}",
        f"--workdir={workdir}",
        *TINY,
        *arguments,
    ]


def test_from_the_archives_to_the_figures(tmp_path):
    archives, prepared = tmp_path / "archives", tmp_path / "prepared"
    archives.mkdir()
    make_archives(archives, num_train=40, num_validation=20)
    run(
        *("prepare", "imagenet2012", f"--manual_dir={archives}"),
        *(f"--data_dir={prepared}", "--check=none"),
    )

    # One network in one go, and of another seed one that is killed and resumed.
    first, second = tmp_path / "runs" / "first", tmp_path / "runs" / "second"
    printed = run(*train("ensemble_2", prepared, first))
    assert "by population" in printed
    other = "--config.seed=4"
    killed = subprocess.Popen(
        command(*train("ensemble_2", prepared, second, other)),
        cwd=REPOSITORY,
        env=command_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while killed.poll() is None and not (second / "checkpoints" / "10").exists():
        time.sleep(0.05)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    assert not (second / "summary.json").exists()
    printed = run(*train("ensemble_2", prepared, second, other))
    assert "Going on from the checkpoint of step" in printed
    whole = tmp_path / "whole"
    run(*train("ensemble_2", prepared, whole, other))
    for name in ("metrics.jsonl", "summary.json"):
        assert (second / name).read_bytes() == (whole / name).read_bytes()

    # Figure 4: each network and both, by one crop and by 144.
    figure4 = tmp_path / "figure4"
    printed = run(
        *("evaluate", str(first), str(second), "--crops=1,144"),
        *(f"--data_dir={prepared}", f"--output={figure4}"),
    )
    rows = json.loads((figure4 / "figure4.json").read_text())["rows"]
    assert [(row["crops"], row["models"]) for row in rows] == (
        [(1, 1), (1, 1), (1, 2), (144, 1), (144, 1), (144, 2)]
    )
    summary = json.loads((first / "summary.json").read_text())
    top1 = summary["final"]["population"]["top1"]
    assert rows[0]["top1_error"] == pytest.approx(100 - top1)

    # Figures 2 and 3.
    output = tmp_path / "comparison"
    run(
        *("compare", str(first.parent), "--reference=ensemble_2"),
        f"--output={output}",
    )
    for name in ("figure2.png", "figure3.svg", "comparison.md", "comparison.json"):
        assert (output / name).stat().st_size > 0


def test_the_broken_and_the_strange(tmp_path):
    make_imagenet(tmp_path, file_format="tfrecord", num_train=40, num_validation=20)
    workdir = tmp_path / "run"
    printed = run(*train("bn_x5", tmp_path, workdir, "--config.num_steps=10"))
    assert "2 images could not be decoded" in printed
    assert "val" in printed
