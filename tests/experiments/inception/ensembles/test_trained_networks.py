import contextlib
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.checkpoints.save import Checkpoints, restore_newest
from experiments.checkpoints.stored import CheckpointError
from experiments.configuration.fields import ConfigError
from experiments.data.errors import DataError
from experiments.inception.comparison.runs import read_runs
from experiments.inception.ensembles.trained_networks import (
    SHARED_KEYS,
    Network,
    check_runs,
    load_networks,
    open_data,
)
from experiments.inception.experiment import NETWORK
from experiments.inception.training import POPULATION
from experiments.running.workdir import WorkdirError, read_json, write_json
from tests.experiments.helpers import ORBAX_LEFTOVERS, assert_trees_identical
from tests.experiments.inception.tiny_inception import (
    NUM_TEST,
    TinyInception,
    load_tiny,
    run_tiny,
    tiny_config,
)

MOVING_AVERAGE = "moving_average"

pytestmark = [
    pytest.mark.filterwarnings(ORBAX_LEFTOVERS),
    pytest.mark.usefixtures("collect_dropped_coroutines"),
]


def train(folder: Path, variant: str = "bn_x5", **changes: object) -> Path:
    """A run of four steps."""
    short = {"num_steps": 4, "eval_every": 4, "checkpoint_every": 2}
    config = tiny_config(variant, **{**short, **changes})
    run_tiny(config, folder)
    return folder


def load(*folders: Path, statistics: str = POPULATION) -> list[Network]:
    """What the command does before it evaluates."""
    runs = read_runs(folders)
    check_runs(runs, statistics)
    data = open_data(runs, None, load_tiny())
    return load_networks(runs, statistics, data, TinyInception)


def restore(network: Network, folder: Path) -> tuple[int, object]:
    """The newest state in a folder, by way of a state that was really made."""
    state = network.experiment.initial_state()
    step, states, _ = restore_newest(folder, {NETWORK: state})
    return step, states[NETWORK]


def contents(directory: Path) -> dict[str, tuple]:
    """Everything below a directory, with the times of its changes."""
    return {
        str(path.relative_to(directory)): (
            path.stat().st_mtime_ns,
            path.read_bytes() if path.is_file() else None,
        )
        for path in directory.rglob("*")
    }


def change(folder: Path, name: str = "config.json", **changes: object) -> None:
    """Overwrites values in a JSON file of a run; None removes one."""
    path = folder / name
    content = read_json(path) | changes
    kept = {key: value for key, value in content.items() if value is not None}
    write_json(path, kept)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Trained runs, not to be changed."""
    folder = tmp_path_factory.mktemp("runs")
    train(folder / "bn")
    train(folder / "plain", "inception")
    return folder


@pytest.fixture
def bn(runs, tmp_path) -> Path:
    return shutil.copytree(runs / "bn", tmp_path / "bn")


def error_of(kind: type[Exception], *folders: Path, **options: str) -> str:
    with pytest.raises(kind) as caught:
        load(*folders, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("statistics", "name"),
    {POPULATION: "population", MOVING_AVERAGE: "checkpoints"}.items(),
)
def test_a_network_has_the_statistics_that_are_asked_for(runs, statistics, name):
    (network,) = load(runs / "bn", statistics=statistics)
    step, state = restore(network, runs / "bn" / name)
    assert network.step == step == 4
    assert network.statistics == statistics
    assert_trees_identical(
        jax.device_get(network.state), jax.device_get(state._replace(opt_state=()))
    )
    for leaf in jax.tree.leaves(network.state):
        assert leaf.is_fully_replicated
        assert len(leaf.devices()) == jax.local_device_count()


def test_the_statistics_differ(runs):
    (population,) = load(runs / "bn")
    (average,) = load(runs / "bn", statistics=MOVING_AVERAGE)
    assert_trees_identical(population.state.params, average.state.params)
    pairs = zip(
        jax.tree.leaves(population.state.batch_stats),
        jax.tree.leaves(average.state.batch_stats),
        strict=True,
    )
    assert not any(np.allclose(one, other) for one, other in pairs)


def test_without_normalisation_there_are_no_statistics(runs):
    for statistics in (POPULATION, MOVING_AVERAGE):
        (network,) = load(runs / "plain", statistics=statistics)
        assert network.statistics is None
        assert network.state.batch_stats == {}
        assert network.step == 4
        _, state = restore(network, runs / "plain" / "checkpoints")
        assert_trees_identical(network.state.params, state.params)


def test_the_folders_of_runs_stay_as_they_are(runs):
    before = contents(runs)
    for statistics in (POPULATION, MOVING_AVERAGE):
        assert load(runs, statistics=statistics)
    assert contents(runs) == before


def test_reading_does_not_disturb_a_run_that_trains(bn):
    """Its process has the folder open and is in the middle of saving."""
    (network,) = load(bn)
    state = network.experiment.initial_state()
    shutil.rmtree(bn / POPULATION)
    (bn / "summary.json").unlink()
    folder = bn / "checkpoints"
    with contextlib.closing(Checkpoints(folder)) as checkpoints:
        for step in (5, 6):
            (folder / f"{step}.orbax-checkpoint-tmp").mkdir()
            before = contents(bn)
            (found,) = load(bn, statistics=MOVING_AVERAGE)
            assert found.step == step - 1
            assert contents(bn) == before
            (folder / f"{step}.orbax-checkpoint-tmp").rmdir()
            checkpoints.save(step, {NETWORK: state})
            checkpoints._manager.wait_until_finished()
    assert sorted(os.listdir(folder)) == ["4", "5", "6"]  # 4 is the best
    (found,) = load(bn, statistics=MOVING_AVERAGE)
    assert found.step == 6
    assert_trees_identical(found.state.params, state.params)


def test_names_tell_networks_apart(runs, tmp_path):
    for name in ("a", "b", "c"):
        shutil.copytree(runs / "bn", tmp_path / name)
    change(tmp_path / "b", seed=3)
    change(tmp_path / "c", seed=3, workers=5)
    shutil.copytree(runs / "plain", tmp_path / "d")
    networks = load(tmp_path)
    assert [network.folder.name for network in networks] == ["a", "b", "c", "d"]
    assert [network.name for network in networks] == [
        "bn_x5 (seed=0)",
        f"bn_x5 (seed=3), {tmp_path / 'b'}",
        f"bn_x5 (seed=3), {tmp_path / 'c'}",
        "inception",
    ]


def test_what_is_compiled_is_shared_where_inference_is_the_same(bn, tmp_path):
    other = shutil.copytree(bn, tmp_path / "other")
    different = {"seed": 5, "dropout_rate": 0.1, "initial_scale": 2.0, "decay": 0.5}
    change(other, **different)
    third = shutil.copytree(bn, tmp_path / "third")
    change(third, epsilon=0.1)
    first, second, apart = load(bn, other, third)
    assert second.experiment._functions is first.experiment._functions
    assert apart.experiment._functions is not first.experiment._functions
    assert second.config.items() >= different.items()


@pytest.mark.parametrize("key", SHARED_KEYS)
def test_networks_must_see_the_same(bn, runs, key):
    config = read_json(bn / "config.json")
    value = "other" if key == "dataset" else not config[key]
    change(bn, **{key: value})
    message = error_of(ConfigError, runs / "plain", bn)
    for run, seen in ((runs / "plain", config[key]), (bn, value)):
        assert f"{seen} in {run}" in message
    assert message.startswith(f"the runs differ in {key} (")


@pytest.mark.parametrize("missing", ["width", "data"])
def test_runs_of_another_kind(bn, missing):
    change(bn, **{missing: None})
    assert f"{bn / 'config.json'} lacks {missing}" in error_of(WorkdirError, bn)


def test_a_diverged_run_is_named(bn, runs):
    change(bn, "summary.json", diverged_at=1_003)
    for statistics in (POPULATION, MOVING_AVERAGE):
        message = error_of(WorkdirError, runs, bn, statistics=statistics)
        assert f"{bn} diverged at step 1,003" in message


@pytest.mark.parametrize("empty", [True, False])
def test_a_run_without_population_statistics(bn, empty):
    (bn / "summary.json").unlink()
    shutil.rmtree(bn / POPULATION)
    if empty:  # killed while it saved them
        (bn / POPULATION / "4.orbax-checkpoint-tmp").mkdir(parents=True)
    before = contents(bn)
    message = error_of(WorkdirError, bn)
    assert f"{bn} has no statistics of the population" in message
    assert "finish it, or give --statistics=moving_average" in message
    assert contents(bn) == before
    (network,) = load(bn, statistics=MOVING_AVERAGE)
    assert network.statistics == MOVING_AVERAGE


@pytest.mark.parametrize("empty", [True, False])
def test_a_run_without_checkpoint(bn, empty):
    shutil.rmtree(bn / "checkpoints")
    if empty:
        (bn / "checkpoints").mkdir()
    before = contents(bn)
    message = error_of(WorkdirError, bn, statistics=MOVING_AVERAGE)
    assert f"{bn / 'checkpoints'} holds no checkpoint yet" in message
    assert "trained for 2 steps" in message
    assert contents(bn) == before


def test_a_damaged_state_is_named(bn):
    for path in (bn / POPULATION / "4").rglob("*"):
        if path.is_file() and path.stat().st_size > 100:
            path.write_bytes(path.read_bytes()[:50])
    message = error_of(CheckpointError, bn)
    assert message.startswith(f"no checkpoint in {bn / POPULATION} is sound: 4 (")
    assert load(bn, statistics=MOVING_AVERAGE)


def test_in_place_of_a_damaged_state_the_one_before_is_taken(bn, capsys):
    (bn / "checkpoints" / "4" / "metadata" / "metadata").unlink()
    before = contents(bn)
    (network,) = load(bn, statistics=MOVING_AVERAGE)
    assert network.step == 2
    assert f"{bn / 'checkpoints' / '4'} is damaged (metadata" in capsys.readouterr().out
    assert contents(bn) == before


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("test_examples", 99, f"99 test examples there, {NUM_TEST} here"),
        ("classes", 1_000, "1000 classes there, 6 here"),
    ],
)
def test_data_must_be_those_of_every_run(bn, runs, key, value, expected):
    data = read_json(bn / "config.json")["data"]
    change(bn, data=data | {key: value})
    message = error_of(DataError, runs, bn)
    assert f"what {bn} was trained with: {expected};" in message


def test_networks_may_have_seen_parts_of_the_training_set(bn, runs):
    data = read_json(bn / "config.json")["data"]
    change(bn, data=data | {"training_examples": 7}, seed=9)
    networks = load(bn, runs / "bn")
    assert sorted(network.name for network in networks) == [
        "bn_x5 (seed=0)",
        "bn_x5 (seed=9)",
    ]
