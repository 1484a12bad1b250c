"""Runs that stop anywhere, and workdirs that were damaged in between."""

import shutil

import pytest

from experiments.checkpoints.stored import CheckpointError, read_arrays, read_metadata
from experiments.mnist import training
from experiments.running import loop
from experiments.running.workdir import WorkdirError
from tests.experiments.helpers import (
    ORBAX_LEFTOVERS,
    RESULTS,
    assert_trees_identical,
    read_files,
    run_small,
    small_config,
)

CONFIG = small_config()


class Stopped(Exception):
    """Stands for whatever may end a run."""


def stop_after(monkeypatch, calls: int) -> None:
    """Makes the progress bar raise in its n-th update."""
    original = loop.progress_bar
    left = [calls]

    def make_bar(*args, **options):
        bar = original(*args, **options)
        update = bar.update

        def count_down(steps):
            left[0] -= 1
            if not left[0]:
                raise Stopped
            update(steps)

        bar.update = count_down
        return bar

    monkeypatch.setattr(loop, "progress_bar", make_bar)


def stop_run(monkeypatch, workdir, calls: int) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, calls)
        with pytest.raises(Stopped):
            run_small(CONFIG, workdir)


def final_arrays(workdir):
    checkpoint = workdir / "checkpoints" / "40"
    return read_arrays(checkpoint, read_metadata(checkpoint))


def assert_same_results(workdir, finished) -> None:
    for name in RESULTS:
        assert (workdir / name).read_bytes() == (finished / name).read_bytes(), name
    assert_trees_identical(final_arrays(workdir), final_arrays(finished))


@pytest.mark.parametrize("calls", [1, 2, 4])
def test_a_stopped_run_goes_on_to_the_same_bits(
    tmp_path, monkeypatch, finished, capsys, calls
):
    stop_run(monkeypatch, tmp_path, calls)
    assert not (tmp_path / "summary.json").exists()
    run_small(CONFIG, tmp_path)
    going_on = f"Going on from the checkpoint of step {10 * (calls - 1)} in {tmp_path}"
    assert going_on in capsys.readouterr().out
    assert_same_results(tmp_path, finished)


def test_a_run_stopped_again_and_again(tmp_path, monkeypatch, finished):
    for _ in range(3):
        stop_run(monkeypatch, tmp_path, 2)
    run_small(CONFIG, tmp_path)
    assert_same_results(tmp_path, finished)


def test_a_run_stopped_after_training(tmp_path, monkeypatch, finished):
    def fail(*_):
        raise Stopped

    for name in "summarise", "save":
        with monkeypatch.context() as patch:
            patch.setattr(training, name, fail)
            with pytest.raises(Stopped):
                run_small(CONFIG, tmp_path)
        monkeypatch.setattr(training.Experiment, "step", fail)  # trains no more
    run_small(CONFIG, tmp_path)
    assert_same_results(tmp_path, finished)


def test_rows_after_the_checkpoint_and_a_half_line_are_dropped(
    tmp_path, monkeypatch, finished
):
    stop_run(monkeypatch, tmp_path, 3)
    for name in "metrics.jsonl", "percentiles.jsonl":
        with (tmp_path / name).open("a") as file:
            file.write('{"step": 30, "network": "baseline"}\n{"step": 30, "netw')
    run_small(CONFIG, tmp_path)
    assert_same_results(tmp_path, finished)


@pytest.mark.filterwarnings(ORBAX_LEFTOVERS)
def test_from_a_damaged_checkpoint_it_goes_on_with_the_one_before(
    copied, finished, capsys
):
    (copied / "summary.json").unlink()
    newest = copied / "checkpoints" / "40"
    for path in (newest / "params").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:-20])
    damaged = read_files(newest)
    run_small(CONFIG, copied)
    out = capsys.readouterr().out
    assert f"Checkpoint {newest} is damaged (params cannot be read: " in out
    assert f"Going on from the checkpoint of step 30 in {copied}" in out
    assert_same_results(copied, finished)
    assert read_files(copied / "checkpoints" / "40.damaged") == damaged


@pytest.mark.filterwarnings(ORBAX_LEFTOVERS)
def test_without_a_sound_checkpoint_it_stops_and_everything_stays(copied):
    (copied / "summary.json").unlink()
    for step in "30", "40":
        shutil.rmtree(copied / "checkpoints" / step / "params")
    before = read_files(copied)
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is sound: 40 "):
        run_small(CONFIG, copied)
    assert read_files(copied) == before


@pytest.mark.parametrize("name", ["metrics.jsonl", "percentiles.jsonl"])
def test_lost_rows_are_an_error_and_the_rest_stays(copied, name):
    (copied / "summary.json").unlink()
    path = copied / name
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:3]))
    before = read_files(copied)
    with pytest.raises(WorkdirError, match=f"{path} is damaged, or of another run"):
        run_small(CONFIG, copied)
    assert read_files(copied) == before


def test_damaged_summary_is_an_error(copied):
    path = copied / "summary.json"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(WorkdirError, match=f"{path} is damaged"):
        run_small(CONFIG, copied)
