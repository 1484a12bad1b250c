import json

import numpy as np
import pytest

from experiments.inception.comparison.runs import group_runs, read_run, read_runs
from experiments.running.workdir import WorkdirError

CONFIG = {
    "variant": "bn_x5",
    "seed": 0,
    "num_steps": 1_200,
    "learning_rate": 0.1,
    "rate_multiple": 3.0,
    "batch_size": 32,
    "dataset": "cluttered_mnist",
    "image_size": 64,
    "crop_fraction": 1.0,
    "eval_examples": 2_000,
}
FINISHED = {"diverged_at": None, "final": None}


def make_rows(accuracy: dict[int, float]) -> list[dict]:
    return [
        {"step": step, "loss": None, "top1": top1, "top5": 99.0, "test_loss": 0.5}
        for step, top1 in accuracy.items()
    ]


def make_folder(folder, accuracy, summary=FINISHED, **changes):
    """The folder of a run that was evaluated at some steps."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    lines = [json.dumps(row) + "\n" for row in make_rows(accuracy)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def names_of(tmp_path, *changes, **options):
    for number, change in enumerate(changes):
        make_folder(tmp_path / str(number), {0: 1.0}, **change)
    groups = group_runs(read_runs([tmp_path]), **options)
    return {
        name: [int(run.folder.name) for run in group] for name, group in groups.items()
    }


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "run", {0: 10.0, 100: 55.5})


def error_of(*folders) -> str:
    with pytest.raises(WorkdirError) as caught:
        read_runs(folders)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_finished_run(folder):
    run = read_run(folder)
    assert run.folder == folder
    assert run.config == CONFIG
    np.testing.assert_array_equal(run.steps, [0, 100])
    np.testing.assert_array_equal(run.top1, [10.0, 55.5])
    assert run.summary == FINISHED
    assert run.diverged_at is None


def test_a_diverged_run(tmp_path):
    summary = {"diverged_at": 1_153, "final": None}
    run = read_run(make_folder(tmp_path / "run", {0: 10.0}, summary))
    assert run.diverged_at == 1_153


def test_a_running_run_ends_at_its_last_whole_row(folder):
    (folder / "summary.json").unlink()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 200, "top1"')
    run = read_run(folder)
    assert run.summary is None
    assert run.diverged_at is None
    assert list(run.steps) == [0, 100]


def test_initial_rate_is_the_baselines_times_the_multiple(folder):
    assert 0.1 * 3.0 != 0.3
    assert read_run(folder).initial_rate == 0.3


def test_a_folder_stands_for_the_runs_below_it(tmp_path):
    sweep = tmp_path / "sweep"
    runs = [make_folder(sweep / name, {0: 1.0}) for name in ("b", "a")]
    make_folder(sweep / "deep" / "down", {0: 1.0})
    (sweep / "comparison").mkdir()
    assert [run.folder for run in read_runs([sweep])] == [runs[1], runs[0]]


def test_each_run_is_read_once_in_the_order_of_names(tmp_path):
    sweep = tmp_path / "sweep"
    one, two = (make_folder(sweep / name, {0: 1.0}) for name in "ab")
    roundabout = sweep / ".." / "sweep" / "b"
    assert [run.folder for run in read_runs([two, roundabout, sweep, one])] == [
        one,
        two,
    ]


def test_runs_below_without_evaluation_are_left_out_aloud(tmp_path, capsys):
    one = make_folder(tmp_path / "a", {0: 1.0})
    empty = make_folder(tmp_path / "b", {})
    without = make_folder(tmp_path / "c", {})
    (without / "metrics.jsonl").unlink()
    assert [run.folder for run in read_runs([tmp_path])] == [one]
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        f"{run} holds no evaluation yet: left out." for run in (empty, without)
    ]


def test_nothing_to_compare(tmp_path):
    assert "no run to compare" in error_of()
    make_folder(tmp_path / "sweep" / "a", {})
    assert "no run to compare" in error_of(tmp_path / "sweep")


@pytest.mark.parametrize("make", [True, False])
def test_folder_that_holds_no_run(tmp_path, make):
    other = tmp_path / "other"
    if make:
        (other / "sub").mkdir(parents=True)
    message = error_of(other)
    assert f"{other} holds no run: expected config.json and metrics.jsonl" in message


def test_missing_metrics(folder):
    (folder / "metrics.jsonl").unlink()
    assert f"{folder} lacks metrics.jsonl" in error_of(folder)


def test_no_evaluation_yet(tmp_path):
    folder = make_folder(tmp_path / "run", {})
    assert f"{folder} holds no evaluation yet" in error_of(folder)


@pytest.mark.parametrize("name", ["config.json", "summary.json"])
def test_damaged_files(folder, name):
    (folder / name).write_text("{")
    assert f"{folder / name} is damaged" in error_of(folder)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "config.json",
            f"lacks {', '.join(key for key in CONFIG if key != 'dataset')}",
        ),
        ("summary.json", "lacks diverged_at, final"),
    ],
)
def test_files_of_another_experiment(folder, name, expected):
    (folder / name).write_text('{"dataset": "mnist"}')
    message = error_of(folder)
    assert f"{folder / name} {expected}: expected that of a run" in message


@pytest.mark.parametrize(
    "row", [{"step": 200}, {"step": 200, "top1": None}, {"top1": 3}]
)
def test_rows_of_another_experiment(folder, row):
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    assert "has a row without step or top1" in error_of(folder)


def test_runs_that_differ_in_their_seed_are_one_model(tmp_path):
    changes = [{"seed": seed, "data_checksum": str(seed)} for seed in range(3)]
    groups = names_of(tmp_path, *changes, {"variant": "inception"})
    assert groups == {"bn_x5": [0, 1, 2], "inception": [3]}


def test_the_order_of_configuration_keys_does_not_matter(tmp_path):
    for name, keys in (("0", [*CONFIG]), ("1", [*reversed(CONFIG)])):
        folder = make_folder(tmp_path / name, {0: 1.0})
        config = {key: CONFIG[key] for key in keys}
        (folder / "config.json").write_text(json.dumps(config))
    (group,) = group_runs(read_runs([tmp_path])).values()
    assert len(group) == 2


def test_whole_and_decimal_numbers_are_one_value(tmp_path):
    assert names_of(tmp_path, {"width": 1}, {"width": 1.0, "seed": 1}) == {
        "bn_x5": [0, 1]
    }


def test_names_tell_models_of_one_variant_apart(tmp_path):
    """By the keys in which they differ, but not by those of other variants."""
    changes = [
        {"initialisation": "gaussian"},
        {"initialisation": "he", "learning_rate": 0.01},
        {"initialisation": "he", "learning_rate": 0.01, "seed": 1},
        {"learning_rate": 0.01, "rows": ["5a", "5b"]},
        {"variant": "inception", "batch_size": 64},
    ]
    assert names_of(tmp_path, *changes) == {
        "bn_x5 (initialisation=gaussian, learning_rate=0.1, rows=absent)": [0],
        "bn_x5 (initialisation=he, learning_rate=0.01, rows=absent)": [1, 2],
        "bn_x5 (initialisation=absent, learning_rate=0.01, rows=['5a', '5b'])": [3],
        "inception": [4],
    }


def test_other_keys_can_be_left_out_of_account(tmp_path):
    changes = [{"learning_rate": 0.1}, {"learning_rate": 0.2}, {"batch_size": 64}]
    names = names_of(tmp_path, *changes, but=("seed", "learning_rate"))
    assert names == {"bn_x5 (batch_size=32)": [0, 1], "bn_x5 (batch_size=64)": [2]}
