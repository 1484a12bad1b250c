import json
import math
import re
import shutil

import jax
import numpy as np
import pytest

from experiments.checkpoints.save import restore_newest
from experiments.configuration.fields import ConfigError
from experiments.data.batches import batch_indices
from experiments.data.errors import DataError
from experiments.data.file_feed import ImageBatch
from experiments.distributed import parallel
from experiments.distributed.parallel import DeviceError
from experiments.inception import data as data_module
from experiments.inception import training
from experiments.inception.config import CONFIGURATION
from experiments.inception.experiment import Experiment
from experiments.inception.training import (
    check_config,
    describe_network,
)
from experiments.running.metrics import read_rows
from experiments.running.workdir import WorkdirError, open_workdir, read_json
from tests.experiments.helpers import (
    ORBAX_LEFTOVERS,
    assert_trees_identical,
    read_files,
)
from tests.experiments.inception import tiny_inception
from tests.experiments.inception.tiny_inception import (
    NUM_CLASSES,
    NUM_TEST,
    NUM_TRAIN,
    TinyInception,
    load_tiny,
    run_tiny,
    tiny_config,
    tiny_data,
    tiny_experiment,
)

CONFIG = tiny_config()
RESULTS = ("config.json", "metrics.jsonl", "summary.json")
# Diverges slowly: with this penalty each step multiplies the weights by about -10^4.
DIVERGING = tiny_config(
    "inception",
    dropout_rate=0.0,
    local_response_norm=False,
    l2_weight=1.0,
    learning_rate=1e4,
    momentum=0.0,
    decay_factor=1.0,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The workdir of an uninterrupted run, not to be changed."""
    workdir = tmp_path_factory.mktemp("finished")
    run_tiny(CONFIG, workdir)
    return workdir


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copied")


class Stopped(Exception):
    """Stands for whatever may end a run."""


def fail(*_, **__):
    raise Stopped


def stop_run(workdir, config, owner, name, calls=1) -> None:
    """A run where the n-th call of a function, or method, raises."""
    original = getattr(owner, name)
    left = [calls]

    def count_down(*args, **options):
        left[0] -= 1
        return (original if left[0] else fail)(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, count_down)
        with pytest.raises(Stopped):
            run_tiny(config, workdir)


def restore(folder, config=CONFIG):
    """The step and state of the newest checkpoint of a folder."""
    like = {training.NETWORK: tiny_experiment(config).initial_state()}
    step, states, _ = restore_newest(folder, like)
    return step, states[training.NETWORK]


def assert_same_results(workdir, finished) -> None:
    for name in RESULTS:
        assert (workdir / name).read_bytes() == (finished / name).read_bytes(), name
    for name in "checkpoints", "population":
        assert_trees_identical(restore(workdir / name), restore(finished / name))


def read_summary(workdir):
    def refuse(constant):
        raise AssertionError(constant)

    text = (workdir / "summary.json").read_text()
    return json.loads(text, parse_constant=refuse)


def losses_by_hand(config, num_steps):
    """The plainest loop, and the state that it ends with."""
    experiment, data = tiny_experiment(config), tiny_data(config)
    state, losses = experiment.initial_state(), []
    for step, batch in enumerate(data.training(0, num_steps)):
        state, loss = experiment.train_step(state, step, batch)
        losses.append(np.asarray(loss))
    return losses, state


# What a run leaves.


def test_everything_is_there(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {*RESULTS, "checkpoints", "population", "tensorboard", ".lock"}
    for folder, steps in (("checkpoints", {"8", "10"}), ("population", {"10"})):
        assert {path.name for path in (finished / folder).iterdir()} == steps
    assert list((finished / "tensorboard").glob("events.out.tfevents.*"))
    config = read_json(finished / "config.json")
    data = config.pop("data")
    assert config.pop("feed_used") == "files"
    assert config == json.loads(json.dumps(CONFIG))
    assert data == {
        "training_examples": NUM_TRAIN,
        "training_checksum": tiny_data(CONFIG).train.checksum,
        "test_examples": NUM_TEST,
        "classes": NUM_CLASSES,
    }


def test_rows_are_those_of_a_plain_loop(finished):
    rows = read_rows(finished / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 5, 10]
    losses, state = losses_by_hand(CONFIG, 10)
    # Since the evaluation or checkpoint before, of steps 4 and 8.
    expected = [None, float(losses[4]), float(np.mean(losses[8:]))]
    assert [row["loss"] for row in rows] == expected
    assert_trees_identical(restore(finished / "checkpoints"), (10, state))
    for row in rows:
        assert row.keys() == {"step", "loss", "top1", "top5", "test_loss"}
        assert 0 <= row["top1"] <= row["top5"] <= 100
        hits = row["top1"] * 24 / 100
        assert hits == pytest.approx(round(hits), abs=1e-9)
    scores = tiny_experiment(CONFIG).evaluate(state, tiny_data(CONFIG).testing(24))
    assert scores.count == 24
    last = {key: rows[-1][key] for key in ("top1", "top5", "test_loss")}
    percentages = scores.percentages()
    assert last == percentages | {"test_loss": percentages.pop("loss")}


def test_summary(finished):
    summary = read_summary(finished)
    rows = read_rows(finished / "metrics.jsonl")
    best = max(row["top1"] for row in rows)
    first = next(row["step"] for row in rows if row["top1"] == best)
    assert summary["best"] == {"step": first, "top1": best}
    # A 3x3 convolution of 3 to 4 channels, its normalisation, and 4 features to 6.
    assert summary["num_parameters"] == 108 + 8 + 30
    assert summary["steps"] == 10
    assert summary["diverged_at"] is None
    assert summary["config"] == json.loads(json.dumps(CONFIG))
    assert summary["data"]["test_examples"] == NUM_TEST
    assert summary["devices"] == 8
    assert summary["jax"] == jax.__version__


def test_final_accuracies_are_of_all_test_examples(finished):
    experiment, data = tiny_experiment(CONFIG), tiny_data(CONFIG)
    _, state = restore(finished / "checkpoints")
    step, population = restore(finished / "population")
    assert step == 10
    expected = {
        "population": experiment.evaluate(population, data.testing()),
        "test_batch": experiment.evaluate(state, data.testing(), by_test_batch=True),
        "moving_average": experiment.evaluate(state, data.testing()),
    }
    final = read_summary(finished)["final"]
    assert final == {key: scores.percentages() for key, scores in expected.items()}
    assert {scores.count for scores in expected.values()} == {NUM_TEST}
    assert len({scores["loss"] for scores in final.values()}) == 3


def test_population_statistics_come_from_the_batches_that_follow(finished):
    _, state = restore(finished / "checkpoints")
    _, population = restore(finished / "population")
    batches = list(tiny_data(CONFIG).training(0, 13))[10:]
    expected = tiny_experiment(CONFIG).population_statistics(state, 10, batches)
    assert_trees_identical(population.batch_stats, jax.device_get(expected))
    assert_trees_identical(population._replace(batch_stats=state.batch_stats), state)


def test_networks_learn(finished):
    rows = read_rows(finished / "metrics.jsonl")
    assert rows[0]["test_loss"] > rows[1]["test_loss"] > rows[2]["test_loss"]


def test_a_network_without_batch_normalisation(tmp_path, capsys):
    config = tiny_config("inception", num_steps=2)
    run_tiny(config, tmp_path)
    final = read_summary(tmp_path)["final"]
    assert final["population"] is final["test_batch"] is None
    assert final["moving_average"]["top5"] > 0
    assert not (tmp_path / "population").exists()
    assert "by population" not in capsys.readouterr().out


def test_a_finished_run_does_nothing(copied, monkeypatch, capsys):
    before = read_files(copied)
    monkeypatch.setattr(training, "Experiment", fail)
    run_tiny(CONFIG, copied)
    assert read_files(copied) == before
    out = capsys.readouterr().out
    assert "finished; nothing to do" in out
    for part in ("bn_x5: 146 parameters, 10 steps, best top-1", "by population: top-1"):
        assert part in out


# What is refused.


@pytest.mark.parametrize(
    ("key", "values"),
    {
        "num_steps": [0, -1, 2**31],
        "steps_per_decay": [0],
        "eval_every": [0],
        "eval_batch_size": [0, -8],
        "population_batches": [0],
        "checkpoint_every": [0],
        "workers": [-2],
        "seed": [-1, 2**31],
        "eval_examples": [-1],
        "max_undecodable": [-1],
        "batch_size": [0, 1, -16],
        "image_size": [0, 31],
        "width": [0.0, -1.0, math.nan, 0.01],
        "epsilon": [0.0, math.inf],
        "initial_std": [0.0],
        "initial_scale": [0.0, -1.0],
        "learning_rate": [0.0, -0.1, math.nan, math.inf],
        "rate_multiple": [0.0],
        "decay_factor": [0.0, 1.01],
        "decay_speed": [0.0],
        "dropout_rate": [-0.1, 1.1, math.nan],
        "decay": [-0.1, 1.1],
        "momentum": [-0.1, 1.1],
        "l2_weight": [-0.1, 1.1],
        "l2_multiple": [-0.1, 1.1],
        "min_area": [0.0, 1.1],
        "crop_fraction": [0.0, 1.1],
        "activation": ["gelu", ""],
        "pool_projection": [64],
        "padding": ["SAME"],
        "input_shift": [(0.1,), (1.0, 2.0)],
        "initialisation": ["zero"],
        "dtype": ["float16"],
        "shuffle": ["all"],
        "distortions": ["some"],
        "per_activation_rows": [("6a",), ("5b", "x"), "5b"],
    }.items(),
)
def test_bad_values_are_named(key, values):
    for value in values:
        with pytest.raises(ConfigError, match=rf"^--config\.{key}=") as caught:
            check_config(tiny_config(**{key: value}))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"num_steps": 0}, ConfigError, "expected at least 1"),
        ({"width": 0.01}, ConfigError, "leaves no channels; use 1/32 or more."),
        ({"batch_size": 12}, DeviceError, "batch_size=12 does not divide over 8"),
        ({"eval_batch_size": 12}, DeviceError, "eval_batch_size=12 does not divide"),
        ({"batch_size": 104}, ConfigError, "is more than the 100 training examples"),
    ],
)
def test_nothing_is_made_for_an_impossible_run(
    tmp_path, monkeypatch, changes, error, message
):
    monkeypatch.setattr(training, "Experiment", fail)
    with pytest.raises(error, match=re.escape(message)) as caught:
        run_tiny(CONFIG | changes, tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("files", "shuffle", "refused"),
    [(1, "shards", True), (2, "shards", False), (1, "examples", False)],
)
def test_one_file_cannot_be_shuffled_by_files(monkeypatch, files, shuffle, refused):
    lengths = property(lambda split: [len(split) // files] * files)
    monkeypatch.setattr(tiny_inception.TinySplit, "shard_lengths", lengths)
    config = CONFIG | {"shuffle": shuffle}
    if not refused:
        tiny_data(config)
        return
    with pytest.raises(ConfigError, match=r"^--config\.shuffle=shards: ") as caught:
        tiny_data(config)
    assert "use --config.shuffle=examples." in str(caught.value)


def test_missing_keys_are_named(tmp_path):
    config = {key: value for key, value in CONFIG.items() if key != "momentum"}
    with pytest.raises(ConfigError, match="lacks momentum;"):
        run_tiny(config, tmp_path)


def test_another_configuration_or_other_data_are_refused(copied, monkeypatch):
    before = read_files(copied)
    with pytest.raises(WorkdirError, match=r"learning_rate: 0.01 there, 0.02 now\."):
        run_tiny(CONFIG | {"learning_rate": 0.02}, copied)
    monkeypatch.setattr(tiny_inception, "NUM_TEST", 30)
    with pytest.raises(WorkdirError, match=r"data: .*44.* there, .*30.* now\."):
        run_tiny(CONFIG, copied)
    assert read_files(copied) == before


def test_a_workdir_in_use_is_refused(copied):
    config = read_json(copied / "config.json")
    with (
        open_workdir(copied, config, CONFIGURATION),
        pytest.raises(WorkdirError, match="another process is writing"),
    ):
        run_tiny(CONFIG, copied)


# Runs that stop, and go on.


@pytest.mark.parametrize(("steps", "from_step"), [(4, 0), (5, 4), (10, 8)])
def test_a_stopped_run_goes_on_to_the_same_bits(
    tmp_path, finished, capsys, steps, from_step
):
    stop_run(tmp_path, CONFIG, Experiment, "train_step", steps)
    assert not (tmp_path / "summary.json").exists()
    run_tiny(CONFIG, tmp_path)
    out = capsys.readouterr().out
    assert f"Going on from the checkpoint of step {from_step} " in out
    assert_same_results(tmp_path, finished)


def test_a_run_stopped_again_and_again(tmp_path, finished):
    # Before the first evaluation, in the second, and after a checkpoint.
    for name, calls in (("initial_state", 1), ("evaluate", 2), ("train_step", 5)):
        stop_run(tmp_path, CONFIG, Experiment, name, calls)
    run_tiny(CONFIG, tmp_path)
    assert_same_results(tmp_path, finished)


def test_a_run_stopped_after_training_trains_no_more(tmp_path, finished, monkeypatch):
    stop_run(tmp_path, CONFIG, training, "_evaluate_finally")
    stop_run(tmp_path, CONFIG, Experiment, "population_statistics")
    monkeypatch.setattr(Experiment, "train_step", fail)
    # Population statistics are on disk when the evaluations that follow begin.
    stop_run(tmp_path, CONFIG, Experiment, "evaluate", 2)
    monkeypatch.setattr(Experiment, "population_statistics", fail)
    stop_run(tmp_path, CONFIG, training, "write_json", 1)
    run_tiny(CONFIG, tmp_path)
    assert_same_results(tmp_path, finished)


def test_rows_after_the_checkpoint_and_a_half_line_are_dropped(tmp_path, finished):
    stop_run(tmp_path, CONFIG, Experiment, "train_step", 7)
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [0, 5]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7}\n{"step": 10, "lo')
    run_tiny(CONFIG, tmp_path)
    assert_same_results(tmp_path, finished)


@pytest.mark.filterwarnings(ORBAX_LEFTOVERS)
def test_damage_loses_nothing(copied, finished, capsys):
    (copied / "summary.json").unlink()
    rows = (copied / "metrics.jsonl").read_text()
    (copied / "metrics.jsonl").write_text(rows[:-20])
    before = read_files(copied)
    with pytest.raises(
        WorkdirError,
        match=r"metrics.jsonl is damaged, or of another run: its first 3 rows",
    ):
        run_tiny(CONFIG, copied)
    assert read_files(copied) == before
    (copied / "metrics.jsonl").write_text(rows)
    newest = copied / "checkpoints" / "10"
    for path in (newest / "params").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:-20])
    damaged = read_files(newest)
    run_tiny(CONFIG, copied)
    out = capsys.readouterr().out
    assert f"Checkpoint {newest} is damaged (params cannot be read: " in out
    assert f"Going on from the checkpoint of step 8 in {copied}" in out
    assert read_files(newest.with_name("10.damaged")) == damaged
    assert_same_results(copied, finished)


# Divergence is a result, as in the paper's section 4.2.2.


def test_a_run_that_diverges_at_once(tmp_path, capsys):
    config = DIVERGING | {"learning_rate": 1e30, "eval_every": 1}
    run_tiny(config, tmp_path)
    losses, _ = losses_by_hand(config, 2)
    assert [bool(np.isfinite(loss)) for loss in losses] == [True, False]
    summary = read_summary(tmp_path)
    assert summary["diverged_at"] == summary["steps"] == 2
    assert summary["final"] is None
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1]
    # Its weights are not finite any more: never right.
    assert (rows[1]["top1"], rows[1]["top5"], rows[1]["test_loss"]) == (0, 0, None)
    assert summary["best"] == {"step": 0, "top1": rows[0]["top1"]}
    out = capsys.readouterr().out
    assert "Diverged: the loss of step 2 is not finite." in out
    assert "diverged at step 2" in out
    assert "in the end" not in out


def test_divergence_between_looks_after_a_checkpoint(tmp_path):
    losses, _ = losses_by_hand(DIVERGING, 8)
    first = 1 + [bool(np.isfinite(loss)) for loss in losses].index(False)
    assert first in (6, 7)
    run_tiny(DIVERGING, tmp_path / "whole")
    summary = read_summary(tmp_path / "whole")
    assert summary["diverged_at"] == first
    steps = [row["step"] for row in read_rows(tmp_path / "whole" / "metrics.jsonl")]
    assert steps == [0, 5]
    assert {path.name for path in (tmp_path / "whole" / "checkpoints").iterdir()} == {
        *("0", "4")
    }
    resumed = tmp_path / "resumed"
    stop_run(resumed, DIVERGING, Experiment, "train_step", 7)
    stop_run(resumed, DIVERGING, training, "as_text")
    (resumed / "summary.json").unlink()
    run_tiny(DIVERGING, resumed)
    for name in RESULTS:
        assert (resumed / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


# Images that cannot be decoded.


def test_undecodable_images_are_replaced_or_left_out_and_named(tmp_path, capsys):
    run_tiny(CONFIG, tmp_path, broken_train={3, 50}, broken_test={7})
    out = capsys.readouterr().out
    assert "3 images could not be decoded:\n  image 3 is broken\n  image 50 " in out
    assert "  image 7 is broken\n" in out
    for scores in read_summary(tmp_path)["final"].values():
        hits = scores["top1"] * (NUM_TEST - 1) / 100
        assert hits == pytest.approx(round(hits), abs=1e-9)
    for row in read_rows(tmp_path / "metrics.jsonl"):
        hits = row["top1"] * 23 / 100
        assert hits == pytest.approx(round(hits), abs=1e-9)


def test_too_many_undecodable_images_end_the_run(tmp_path):
    config = CONFIG | {"max_undecodable": 2}
    with pytest.raises(DataError, match="more than 2 images cannot be decoded"):
        run_tiny(config, tmp_path, broken_train={3, 50, 51})
    assert not (tmp_path / "summary.json").exists()
    # When the data is restored, the run goes on.
    run_tiny(config, tmp_path)
    assert read_summary(tmp_path)["steps"] == 10


def test_nothing_is_said_of_intact_images(finished, tmp_path, capsys):
    tiny_data(CONFIG).report_undecodable()
    assert capsys.readouterr().out == ""


# Data and description.


def test_batches_are_as_configured():
    data = tiny_data(CONFIG)
    (batch,) = data.training(3, 4)
    assert batch.images.shape == (16, 32, 32, 3)
    masks = [batch.mask.sum() for batch in data.testing()]
    assert masks == [16, 16, 12]
    assert [batch.mask.sum() for batch in data.testing(20)] == [16, 4]
    assert sum(batch.mask.sum() for batch in data.testing(1_000)) == NUM_TEST
    # Several crops share out a batch among fewer examples: as many as devices divide.
    for images, examples in ((16, 8), (168, 16), (240, 24)):
        wide = tiny_data(CONFIG | {"eval_batch_size": images})
        (first, *others) = wide.testing(crops=10)
        assert first.images.shape == (examples, 5, 32, 32, 3)
        masks = [batch.mask.sum() for batch in (first, *others)]
        assert sum(masks) == NUM_TEST
    for key, value in (("seed", 1), ("shuffle", "shards")):
        (other,) = tiny_data(CONFIG | {key: value}).training(3, 4)
        assert (other.labels != batch.labels).any()


@pytest.mark.parametrize("dataset", ["imagenet2012", "of_the_user"])
def test_describe_network(dataset):
    """Classes are known by the name of the data set, or else read."""
    config = tiny_config(dataset=dataset)
    classes = 1_000 if dataset == "imagenet2012" else NUM_CLASSES
    table = describe_network(
        config, None, network=TinyInception, load=load_tiny()
    ).splitlines()
    assert [line.split()[0] for line in table] == [
        "layer",
        "conv1",
        "classifier",
        "total",
    ]
    assert table[1].split()[1:] == ["16x16x4", "116", "1", f"{256 * 108:,}"]
    assert table[2].split()[1:3] == [str(classes), f"{5 * classes:,}"]
    with pytest.raises(ConfigError, match="expected at least"):
        describe_network(config | {"num_steps": 0}, None)


# The feed of data that lies on the devices.


DEVICE = CONFIG | {"feed": "device", "distortions": "none"}


def test_training_on_the_devices_is_of_the_same_examples(tmp_path, monkeypatch):
    """Images that are neither cropped nor mirrored: steps by hand are the same."""
    monkeypatch.setattr(data_module, "STEPS_PER_PIECE", {"cpu": 3})
    run_tiny(DEVICE, tmp_path)
    config = read_json(tmp_path / "config.json")
    assert config["feed_used"] == "device"
    data, experiment = tiny_data(DEVICE), tiny_experiment(DEVICE)
    examples = data.device_examples()
    state = experiment.initial_state()
    for step in range(10):
        index = batch_indices([0], step, 1, NUM_TRAIN, 16)[0, 0]
        batch = ImageBatch(
            examples.arrays[index], examples.labels[index], np.ones(16, bool)
        )
        state, _ = experiment.train_step(state, step, batch)
    _, found = restore(tmp_path / "checkpoints", DEVICE)
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5),
        found.params,
        state.params,
    )


@pytest.mark.parametrize("gradient_delay", [0, 3])
def test_a_run_on_the_devices_goes_on_to_the_same_bits(tmp_path, gradient_delay):
    """With gradients under way, too."""
    config = DEVICE | {"gradient_delay": gradient_delay}
    run_tiny(config, tmp_path / "whole")
    stop_run(tmp_path / "run", config, Experiment, "step", 6)
    run_tiny(config, tmp_path / "run")
    for name in RESULTS:
        one, other = (
            (tmp_path / each / name).read_bytes() for each in ("run", "whole")
        )
        assert one == other, name


def test_test_images_are_decoded_once_where_training_images_lie_on_devices(monkeypatch):
    data, decoded = tiny_data(DEVICE), []
    original = tiny_inception.TinySplit.evaluation_example

    def count(split, index, crops):
        decoded.append(index)
        return original(split, index, crops)

    monkeypatch.setattr(tiny_inception.TinySplit, "evaluation_example", count)
    files = list(tiny_data(CONFIG).testing(24))
    for expected in 2 * len(decoded), 2 * len(decoded):
        batches = list(data.testing(24))
        jax.tree.map(
            np.testing.assert_array_equal,
            [np.asarray(each) for batch in batches for each in batch],
            [parallel.shard(each, axis=0) for batch in files for each in batch],
        )
        assert len(decoded) == expected


def test_another_feed_is_not_gone_on_with(copied):
    with pytest.raises(WorkdirError, match=r"feed_used: files there, device now"):
        run_tiny(CONFIG | {"feed": "device"}, copied)
    run_tiny(CONFIG | {"feed": "files"}, copied)


def test_what_does_not_fit_is_not_put_on_the_devices(monkeypatch):
    monkeypatch.setattr(data_module, "fits_on_device", lambda num_bytes: False)
    with pytest.raises(ConfigError, match=r"^--config.feed=device: .* bytes: expected"):
        tiny_data(DEVICE)
    assert not tiny_data(CONFIG).on_device


@pytest.mark.parametrize(
    ("backend", "feed", "expected"),
    [("cpu", "auto", False), ("gpu", "auto", True), ("gpu", "files", False)],
)
def test_the_feed_is_chosen_by_platform(monkeypatch, backend, feed, expected):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert tiny_data(CONFIG | {"feed": feed}).on_device == expected
