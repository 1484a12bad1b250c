import math

import pytest

from experiments.configuration.fields import ConfigError
from experiments.mnist.config import FIELDS, RATES, get_config
from experiments.mnist.training import check_config
from tests.experiments.helpers import small_config


@pytest.mark.parametrize("variant", ["", "rates"])
def test_own_variants_are_valid(variant):
    config = get_config(variant).to_dict()
    assert config.keys() == FIELDS.keys()
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
    changed = {key for key in FIELDS if config[key] != FIELDS[key].default}
    assert changed == RATES.keys()


def test_unknown_variant_lists_those_there_are():
    with pytest.raises(ValueError, match=r"unknown variant 'rate'; expected rates\."):
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
