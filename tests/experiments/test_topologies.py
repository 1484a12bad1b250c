"""One run on one device, on several and on several processes: the same numbers."""

import functools
import json

import numpy as np
import pytest

from experiments.checkpoints.stored import read_arrays, read_metadata
from experiments.running.metrics import read_rows
from experiments.running.stopping import TRY_AGAIN
from tests.experiments.inception.tiny_run import tiny_arguments
from tests.experiments.process_group import ProcessGroup

pytestmark = pytest.mark.slow

NUM_STEPS = 20
# Processes, devices of each, and what maps the step over them.
TOPOLOGIES = {
    "mnist": [
        *((1, 8, "pmap"), (1, 8, "shard_map"), (2, 2, "pmap"), (2, 4, "shard_map")),
        *((4, 2, "pmap"), (4, 1, "shard_map")),
    ],
    "inception": [(1, 8, "shard_map"), (2, 2, "pmap"), (4, 1, "shard_map")],
}
MNIST = [
    *("--config.hidden=(8,)", "--config.batch_size=64", "--config.num_seeds=2"),
    *(f"--config.num_steps={NUM_STEPS}", "--config.eval_every=10"),
    *("--config.early_steps=0", "--config.milestones=(10,)"),
    *("--config.population_batches=4", "--config.probe_examples=100"),
]


def mnist_arguments(workdir, **changes):
    return [
        f"--workdir={workdir}",
        *MNIST,
        *(f"--config.{key}={value}" for key, value in changes.items()),
    ]


def inception_arguments(workdir, **changes):
    # Dropout has other masks on other devices, and this variant none.
    return tiny_arguments(workdir, "bn_x5", num_steps=NUM_STEPS, **changes)


EXPERIMENTS = {
    "mnist": ("experiments.mnist", mnist_arguments),
    "inception": ("tests.experiments.inception.tiny_run", inception_arguments),
}


def train(experiment, folder, processes, devices, **changes):
    """Trains to the end; returns metrics, the summary's results and the variables."""
    folder.mkdir(parents=True)
    module, arguments_of = EXPERIMENTS[experiment]
    arguments = arguments_of(folder / "run", **changes)
    with ProcessGroup(
        folder, processes, arguments, devices=devices, module=module
    ) as group:
        for ended in group.wait():
            assert ended.code == 0, ended.output
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert summary["devices"] == processes * devices
    assert summary["processes"] == processes
    return read_run(folder / "run")


def read_run(workdir):
    summary = json.loads((workdir / "summary.json").read_text())
    newest = workdir / "checkpoints" / str(NUM_STEPS)
    arrays = read_arrays(newest, read_metadata(newest), ("params", "batch_stats"))
    return read_rows(workdir / "metrics.jsonl"), summary.get("final"), arrays


def assert_close(found, expected, rtol, atol, path=""):
    """Nested dictionaries and lists, number by number."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_close(found[key], expected[key], rtol, atol, f"{path}/{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for number, pair in enumerate(zip(found, expected, strict=True)):
            assert_close(*pair, rtol, atol, f"{path}/{number}")
    elif isinstance(expected, str | None):
        assert found == expected, path
    else:
        np.testing.assert_allclose(found, expected, rtol, atol, err_msg=path)


@pytest.fixture(scope="module")
def on_one_device(tmp_path_factory):
    """What a run on one device leaves; each experiment trains once."""
    folder = tmp_path_factory.mktemp("one_device")
    return functools.cache(lambda name: train(name, folder / name, 1, 1))


@pytest.mark.parametrize(
    ("experiment", "topology"),
    [(name, topology) for name, all_ in TOPOLOGIES.items() for topology in all_],
)
def test_twenty_steps(on_one_device, tmp_path, experiment, topology):
    """Parameters, statistics and metrics, with last batches that are not full."""
    rows, final, variables = on_one_device(experiment)
    *processes, parallelism = topology
    found_rows, found_final, found_variables = train(
        experiment, tmp_path / "run", *processes, parallelism=parallelism
    )
    assert_close(found_variables, variables, 2e-5, 2e-6)
    # Accuracies are counts: one more or less would be a rounding at a tie.
    assert_close(found_rows, rows, 1e-4, 1e-6)
    assert_close(found_final, final, 1e-4, 1e-6)


@pytest.mark.parametrize(
    ("experiment", "moments"), [("mnist", "local"), ("mnist", "2"), ("inception", "2")]
)
def test_who_shares_moments(experiment, tmp_path, moments):
    """Processes and mappings agree on other moments too, and these do differ."""
    reference = train(experiment, tmp_path / "a", 1, 4, moments=moments)
    divided = train(
        experiment, tmp_path / "b", 2, 2, moments=moments, parallelism="shard_map"
    )
    assert_close(divided[2], reference[2], 2e-5, 2e-6)
    assert_close(divided[0], reference[0], 1e-4, 1e-6)
    shared = train(experiment, tmp_path / "c", 1, 4)
    with pytest.raises(AssertionError):
        assert_close(shared[2], reference[2], 1e-3, 1e-4)


def test_a_run_goes_on_with_other_processes(tmp_path):
    """From two processes of two devices each to one of eight, half way."""
    # Evaluations are where a run can stop.
    changes = {"eval_every": 2}
    rows, _, variables = train("mnist", tmp_path / "whole", 1, 1, **changes)
    workdir = tmp_path / "run"
    arguments = mnist_arguments(workdir, **changes)
    fault = ("1", "terminate", "10")
    with ProcessGroup(tmp_path, 2, arguments, devices=2, fault=fault) as group:
        assert [ended.code for ended in group.wait()] == [TRY_AGAIN] * 2
    arguments.append("--config.parallelism=shard_map")
    with ProcessGroup(tmp_path, 1, arguments, devices=8) as group:
        (ended,) = group.wait()
    assert ended.code == 0, ended.output
    assert "Going on from the checkpoint of step" in ended.output
    found_rows, _, found_variables = read_run(workdir)
    assert_close(found_variables, variables, 2e-5, 2e-6)
    assert_close(found_rows, rows, 1e-4, 1e-6)
