import json
import re

import jax
import numpy as np
import PIL.Image
import pytest

from experiments.checkpoints.save import restore_newest
from experiments.configuration.fields import ConfigError
from experiments.data.batches import batch_indices
from experiments.data.image_set import to_inputs
from experiments.distributed.parallel import DeviceError
from experiments.mnist.config import CONFIGURATION
from experiments.mnist.experiment import Experiment, make_replicas
from experiments.mnist.training import run
from experiments.running.metrics import read_rows
from experiments.running.workdir import WorkdirError, open_workdir, read_json
from experiments.training import evaluation
from tests.experiments.data.conftest import prepare_set, to_examples
from tests.experiments.helpers import (
    RESULTS,
    make_image_set,
    read_files,
    run_small,
    small_config,
)

CONFIG = small_config()


@pytest.fixture(scope="module")
def experiment():
    return Experiment(CONFIG, make_image_set())


@pytest.fixture(scope="module")
def states(experiment):
    return experiment.initial_states()


def test_everything_is_there(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {*RESULTS, "tensorboard", "checkpoints", ".lock"}
    checkpoints = {path.name for path in (finished / "checkpoints").iterdir()}
    assert checkpoints == {"30", "40"}
    assert list((finished / "tensorboard").glob("events.out.tfevents.*"))
    PIL.Image.open(finished / "figure1.png").verify()
    config = read_json(finished / "config.json")
    assert config.keys() == CONFIG.keys() | {"data_checksum"}


def test_rows_are_complete(finished):
    rows = read_rows(finished / "metrics.jsonl")
    where = [
        (step, name) for step in (0, 10, 20, 40) for name in ("baseline", "batch_norm")
    ]
    assert [(row["step"], row["network"]) for row in rows] == where
    for row in rows:
        assert len(row["accuracy"]) == 2
        assert all(0 <= value <= 100 for value in row["accuracy"])
        # Of 101 test examples.
        hits = np.array(row["accuracy"]) * 1.01
        np.testing.assert_allclose(hits, np.round(hits), atol=1e-9)
        assert ("loss" in row) == (row["step"] > 0)
        assert ("population_accuracy" in row) == (row["step"] in (10, 40))
    percentiles = read_rows(finished / "percentiles.jsonl")
    assert [(row["step"], row["network"]) for row in percentiles] == where
    for row in percentiles:
        values = np.array(row["values"])
        assert values.shape == (2, 3, 6)
        assert (np.diff(values, axis=1) >= 0).all()


def test_summary_agrees_with_the_rows(finished):
    summary = json.loads((finished / "summary.json").read_text())
    rows = read_rows(finished / "metrics.jsonl")
    for name, (entry,) in summary["networks"].items():
        assert entry["seeds"] == [0, 1]
        assert list(entry["accuracy"]) == ["10", "40"]
        for step, accuracy in entry["accuracy"].items():
            (row,) = (
                row
                for row in rows
                if (row["step"], row["network"]) == (int(step), name)
            )
            assert accuracy["moving_average"]["values"] == row["accuracy"]
            assert accuracy["population"]["values"] == row["population_accuracy"]
        assert entry["sigmoid_input"]["steps"] == [0, 10, 20, 40]
        assert entry["sigmoid_input"]["travel"]["50"]["mean"] > 0


def test_percentiles_are_those_of_the_probed_examples(finished, experiment, states):
    _, trained, _ = restore_newest(finished / "checkpoints", states)
    inputs = evaluation.sigmoid_inputs(
        experiment.models, 1.0, trained, experiment._probe
    )
    assert experiment._probe.shape == (50, 20)
    for row in read_rows(finished / "percentiles.jsonl")[-2:]:
        values = np.sort(inputs[row["network"]], axis=1)
        expected = np.percentile(values, [15, 50, 85], axis=1).swapaxes(0, 1)
        np.testing.assert_allclose(row["values"], expected, atol=1e-4)


def test_population_statistics_come_from_the_batches_that_follow(experiment, states):
    statistics = experiment.population_statistics(states, 7)["batch_norm"]
    indices = batch_indices([0, 1], 7, 4, 512, 64)  # (steps, replicas, batch)
    images = to_inputs(make_image_set().train_images, binarise=True)
    kernels = states["batch_norm"].params["Dense_0"]["kernel"]
    expected = np.einsum("ri,riu->ru", images[indices].mean((0, 2)), kernels)
    found = statistics["BatchNorm_0"]["mean"]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_networks_learn(finished):
    rows = read_rows(finished / "metrics.jsonl")
    first, last = rows[3], rows[-1]
    assert first["network"] == last["network"] == "batch_norm"
    assert max(last["loss"]) < min(first["loss"])
    assert np.mean(last["population_accuracy"]) > 50


def test_a_finished_run_does_nothing(copied, capsys):
    capsys.readouterr()
    stamps = {path: path.stat().st_mtime_ns for path in copied.rglob("*")}
    before = read_files(copied)
    run_small(CONFIG, copied)
    assert read_files(copied) == before
    stamps.pop(copied / ".lock")
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    out = capsys.readouterr().out
    assert "finished; nothing to do" in out
    assert "batch_norm" in out


def test_another_configuration_is_refused(copied):
    before = read_files(copied)
    with pytest.raises(WorkdirError, match=r"learning_rate: 0.5 there, 0.25 now\."):
        run_small(CONFIG | {"learning_rate": 0.25}, copied)
    assert read_files(copied) == before


def test_other_data_is_refused(copied):
    other = make_image_set()._replace(train_images=make_image_set().train_images[::-1])
    with pytest.raises(WorkdirError, match=r"data_checksum: \w+ there, \w+ now"):
        run(CONFIG, copied, None, load=lambda *_: other)


def test_a_workdir_in_use_is_refused(copied):
    config = read_json(copied / "config.json")
    with (
        open_workdir(copied, config, CONFIGURATION),
        pytest.raises(WorkdirError, match="another process is writing"),
    ):
        run_small(CONFIG, copied)


def test_several_rates_give_the_figure_of_rates(tmp_path):
    config = small_config(
        num_steps=10, learning_rate=(0.1, 2.0), num_seeds=1, probe_examples=0
    )
    run_small(config, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"rates.png", "rates.svg"} < names
    assert not {"figure1.png", "figure1.svg"} & names
    assert (tmp_path / "percentiles.jsonl").read_bytes() == b""
    summary = json.loads((tmp_path / "summary.json").read_text())
    for slow, fast in summary["networks"].values():
        assert (slow["learning_rate"], fast["learning_rate"]) == (0.1, 2.0)


def test_a_diverged_network_is_named_and_the_others_go_on(tmp_path, capsys):
    rates = (0.1, 1e38)
    run_small(small_config(num_steps=20, num_seeds=1, learning_rate=rates), tmp_path)
    found = [
        line
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("Diverged")
    ]
    # Once each, though their losses stay what they are.
    assert found == [
        f"Diverged by step 10: {name}, seed 0, learning_rate 1e+38, initial_std 0.1. "
        "The others go on."
        for name in ("baseline", "batch_norm")
    ]
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["loss"][1] for row in rows if row["step"]] == [None] * 4
    assert all(row["loss"][0] > 0 for row in rows if row["step"])


def test_a_diverged_run_gives_valid_json(tmp_path):
    """Infinite weights are a result, as in the paper's section 4.2.2."""
    run_small(small_config(num_steps=10, learning_rate=3e38), tmp_path)

    def refuse(constant):
        raise AssertionError(constant)

    text = (tmp_path / "summary.json").read_text()
    summary = json.loads(text, parse_constant=refuse)
    (entry,) = summary["networks"]["batch_norm"]
    assert entry["sigmoid_input"]["travel"]["50"]["mean"] is None
    assert (tmp_path / "figure1.png").exists()


def test_prepared_data_set(tmp_path):
    import tensorflow_datasets as tfds

    data = make_image_set(num_train=128, num_test=20)
    features = {
        "image": tfds.features.Image(shape=(5, 4, 1)),
        "label": tfds.features.ClassLabel(num_classes=4),
    }
    splits = {
        split: [
            {"image": example["image"], "label": example["label"]}
            for example in to_examples(images, labels)
        ]
        for split, images, labels in (
            ("train", data.train_images, data.train_labels),
            ("test", data.test_images, data.test_labels),
        )
    }
    prepare_set(tmp_path / "data", splits, features)
    config = small_config(
        dataset="tiny", num_steps=10, checkpoint_every=5, binarise=False
    )
    run(config, tmp_path / "run", str(tmp_path / "data"))
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 0, 10, 10]
    hits = np.array(rows[-1]["accuracy"]) / 5
    np.testing.assert_allclose(hits, np.round(hits), atol=1e-9)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"batch_size": 60}, DeviceError, "does not divide over 8 devices"),
        ({"batch_size": 1024}, ConfigError, "more than the 512 training examples"),
        ({"probe_examples": 1}, ConfigError, "one example alone"),
        ({"num_steps": 0}, ConfigError, "expected at least 1"),
    ],
)
def test_nothing_is_made_for_an_impossible_run(tmp_path, changes, error, message):
    with pytest.raises(error, match=re.escape(message)) as caught:
        run_small(CONFIG | changes, tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_replicas_are_all_combinations():
    config = small_config(
        learning_rate=(0.1, 0.2), initial_std=(1.0, 2.0), num_seeds=2, first_seed=7
    )
    replicas = make_replicas(config)
    assert replicas.learning_rate.tolist() == [0.1] * 4 + [0.2] * 4
    assert replicas.initial_std.tolist() == [1.0, 1.0, 2.0, 2.0] * 2
    assert replicas.seed.tolist() == [7, 8] * 4


def test_networks_of_a_seed_start_alike(states):
    kernels = {
        name: [np.asarray(state.params[f"Dense_{i}"]["kernel"]) for i in range(3)]
        for name, state in states.items()
    }
    for one, other in zip(*kernels.values(), strict=True):
        np.testing.assert_array_equal(one, other)
        assert (one[0] != one[1]).any()
    alone = Experiment(
        small_config(num_seeds=1, first_seed=1, initial_std=0.2), make_image_set()
    )
    for name, state in alone.initial_states().items():
        scaled = jax.tree.map(
            lambda leaf: leaf[1] * 2, {"k": states[name].params["Dense_0"]["kernel"]}
        )
        found = state.params["Dense_0"]["kernel"][0]
        np.testing.assert_allclose(found, scaled["k"], rtol=1e-5)
