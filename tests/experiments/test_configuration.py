import math

import pytest

from experiments.configs.mnist import KEYS, RATES, get_config
from experiments.configuration import (
    ConfigError,
    as_tuple,
    check_at_least,
    check_keys,
    check_one_of,
    check_positive,
    check_shares,
)
from experiments.mnist_measurements import evaluation_steps, milestone_steps
from experiments.mnist_training import check_config
from tests.experiments.helpers import small_config


def test_missing_keys_are_named():
    check_keys({"a": 1, "b": 2}, "ab")
    with pytest.raises(ConfigError, match="lacks a, c; start from get_config"):
        check_keys({"b": 2}, "cba")


@pytest.mark.parametrize("value", [2, 7, (2, 3), [5], (), 2**31 - 1])
def test_at_least_accepts(value):
    check_at_least({"key": value}, 2, "key")


@pytest.mark.parametrize("value", [1, -3, (2, 1), 2.5, math.nan, "2", (2, "x"), 2**31])
def test_at_least_refuses(value):
    with pytest.raises(ConfigError, match=r"^--config\.key=.*: expected at least 2, "):
        check_at_least({"other": 2, "key": value}, 2, "other", "key")


@pytest.mark.parametrize("value", [1e-30, 3, (0.1, 5.0)])
def test_positive_accepts(value):
    check_positive({"key": value}, "key")


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, "1", (), (1.0, 0.0)])
def test_positive_refuses(value):
    with pytest.raises(ConfigError, match=r"^--config\.key=.*: expected a positive"):
        check_positive({"other": 2.0, "key": value}, "other", "key")


@pytest.mark.parametrize("value", [0, 1, 0.0, 1.0, 0.3])
def test_shares_accepts(value):
    check_shares({"key": value}, "key")


@pytest.mark.parametrize("value", [-1e-9, 1.01, 2, math.nan, math.inf, "0.5", None])
def test_shares_refuses(value):
    with pytest.raises(ConfigError, match=r"^--config\.key=.*: expected 0 to 1\.$"):
        check_shares({"other": 0.5, "key": value}, "other", "key")


def test_one_of():
    choices = {"one": ("a", "b"), "other": (96, 128)}
    check_one_of({"one": "b", "other": 96}, choices)
    with pytest.raises(ConfigError, match=r"^--config\.one=c: expected one of a, b\.$"):
        check_one_of({"one": "c", "other": 96}, choices)
    with pytest.raises(ConfigError, match=r"^--config\.other=64: .* of 96, 128\.$"):
        check_one_of({"one": "a", "other": 64}, choices)


def test_as_tuple():
    assert as_tuple(3) == (3,)
    assert as_tuple([3, 4]) == as_tuple((3, 4)) == (3, 4)
    assert as_tuple("ab") == ("ab",)


@pytest.mark.parametrize("variant", ["", "rates"])
def test_own_variants_are_valid(variant):
    config = get_config(variant).to_dict()
    assert config.keys() == KEYS.keys()
    check_config(config)


def test_defaults_are_the_papers():
    config = get_config().to_dict()
    assert config["hidden"] == (100, 100, 100)
    assert config["num_steps"] == 50_000
    assert config["batch_size"] == 60
    assert config["num_seeds"] == 3
    assert config["binarise"] is True
    assert config["milestones"] == (1_000, 10_000, 50_000)


def test_rates_sweeps_rates_and_deviations():
    config = get_config("rates").to_dict()
    assert len(config["learning_rate"]) > 3
    assert len(config["initial_std"]) > 1
    changed = {key for key in KEYS if config[key] != KEYS[key][0]}
    assert changed == RATES.keys()


def test_unknown_variant_lists_those_there_are():
    with pytest.raises(ValueError, match=r"'rate'; there are \['rates'\], or none"):
        get_config("rate")


@pytest.mark.parametrize(
    ("key", "values"),
    {
        "num_steps": [0, -1],
        "num_seeds": [0],
        "hidden": [(), (0,), (5, -1), (1.5,), ("a",)],
        "population_batches": [0],
        "eval_every": [0],
        "early_eval_every": [0],
        "checkpoint_every": [0],
        "milestones": [(0,)],
        "batch_size": [0, 1, -60],
        "first_seed": [-1, 2**31],
        "early_steps": [-1],
        "probe_examples": [-1],
        "learning_rate": [0.0, -0.1, math.nan, math.inf, ()],
        "initial_std": [0.0, ()],
        "epsilon": [0.0, math.inf],
        "decay": [-0.1, 1.1, math.nan],
    }.items(),
)
def test_bad_values_are_named(key, values):
    for value in values:
        with pytest.raises(ConfigError, match=rf"^--config\.{key}=") as caught:
            check_config(small_config(**{key: value}))
        assert "\n" not in str(caught.value)


def test_evaluations_are_dense_early_and_include_the_ends_and_milestones():
    config = small_config(
        num_steps=95, early_eval_every=5, early_steps=20, eval_every=30, milestones=(7,)
    )
    assert evaluation_steps(config) == {0, 5, 7, 10, 15, 20, 30, 60, 90, 95}


def test_milestones_end_with_the_run():
    steps = (1_000, 10, 40)
    assert milestone_steps(small_config(num_steps=40, milestones=steps)) == [10, 40]
    assert milestone_steps(small_config(num_steps=41, milestones=steps)) == [10, 40, 41]
    assert milestone_steps(small_config(milestones=())) == [40]
