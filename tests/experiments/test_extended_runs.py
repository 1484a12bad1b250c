"""Runs that are started again with more steps, beside ones that had them at once."""

import pytest

from experiments.checkpoints.load import load_variables
from experiments.inception.config import get_config, why_as_long
from experiments.running.metrics import read_rows
from experiments.running.workdir import WorkdirError, read_json
from tests.experiments.helpers import assert_trees_identical, run_small, small_config
from tests.experiments.inception.tiny_inception import run_tiny, tiny_config


def numbers(folder, log="metrics.jsonl") -> list:
    """Rows without what the last step alone is measured by."""
    return [
        {key: row[key] for key in row if key != "population_accuracy"}
        for row in read_rows(folder / log)
    ]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    run_tiny(tiny_config(), folder)
    return folder


@pytest.mark.parametrize("steps", [(5,), (4, 8), (5, 8, 9)])
def test_a_longer_run_has_the_numbers_of_one_that_was_so_at_once(
    tmp_path, straight, steps, capsys
):
    for num_steps in (*steps, 10):
        run_tiny(tiny_config(num_steps=num_steps), tmp_path)
    assert f"num_steps from {steps[-1]} to 10" in capsys.readouterr().out
    for checkpoints in ("checkpoints", "population"):
        assert_trees_identical(
            load_variables(tmp_path / checkpoints),
            load_variables(straight / checkpoints),
        )
    found, expected = (
        read_json(folder / "summary.json") for folder in (tmp_path, straight)
    )
    assert found["final"] == expected["final"]
    assert found["steps"] == 10
    assert read_json(tmp_path / "config.json") == read_json(straight / "config.json")
    if steps == (5,):  # when that is evaluated anyway
        assert numbers(tmp_path) == numbers(straight)


def test_mnist(tmp_path, finished):
    run_small(small_config(num_steps=20), tmp_path)
    run_small(small_config(), tmp_path)
    for log in ("metrics.jsonl", "percentiles.jsonl"):
        assert numbers(tmp_path, log) == numbers(finished, log)


@pytest.mark.parametrize("schedule", ["linear", "cosine(alpha=0.1)"])
def test_what_would_change_the_past_is_refused(tmp_path, schedule):
    run_tiny(tiny_config(num_steps=4, schedule=schedule), tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(WorkdirError, match="num_steps: 4 there, 8 now") as caught:
        run_tiny(tiny_config(num_steps=8, schedule=schedule), tmp_path)
    assert f"would change the past (schedule={schedule} takes" in str(caught.value)
    assert (tmp_path / "config.json").read_bytes() == before
    assert (tmp_path / "summary.json").exists()


def test_a_shorter_run_is_another(tmp_path):
    run_tiny(tiny_config(num_steps=8), tmp_path)
    with pytest.raises(WorkdirError, match="num_steps: 8 there, 4 now"):
        run_tiny(tiny_config(num_steps=4), tmp_path)


@pytest.mark.parametrize(
    ("schedule", "refused"),
    {
        "constant": False,
        "staircase": False,
        "linear": True,
        "cosine": True,
        "linear(transition_steps=9)": False,
        "cosine(decay_steps=9, alpha=0.1)": False,
        "linear(end_value=0.1)": True,
    }.items(),
)
def test_which_schedules_depend_on_the_length(schedule, refused):
    import numpy as np

    from experiments.inception.experiment import learning_rates

    short, long = (
        get_config().to_dict() | {"schedule": schedule, "num_steps": num_steps}
        for num_steps in (50, 100)
    )
    rates = [learning_rates(config, np.arange(50)) for config in (short, long)]
    assert bool((rates[0] != rates[1]).any()) == refused == bool(why_as_long(long))
