"""The batch size experiment: orders, settings, a tiny run, going on with one."""

import json

import numpy as np
import pytest

from experiments.batch_size import training
from experiments.batch_size.config import get_config
from experiments.batch_size.training import (
    Setting,
    all_settings,
    check,
    make_order,
    run,
    split,
)
from experiments.configuration.fields import ConfigError
from experiments.data.image_set import ImageSet
from experiments.running.metrics import read_rows
from experiments.running.workdir import WorkdirError

TINY = {
    "methods": ("batch_norm", "ghost", "renorm", "group_norm"),
    "batch_sizes": (4, 8),
    "num_examples": 64,
    "virtual_batch_size": 4,
    "learning_rates": (0.1, 0.2),
    "widths": (4, 4, 4),
    "validation_examples": 20,
}


@pytest.fixture
def tiny_images():
    random = np.random.default_rng(0)
    labels = np.arange(60, dtype=np.int32) % 3
    images = random.integers(0, 60, (60, 28, 28, 1))
    images[np.arange(60), 4 + 8 * labels, 5:20] = 255  # a bar whose height is the class
    images = images.astype(np.uint8)
    return ImageSet(images, labels, images[:30], labels[:30], 3)


def config(**changes):
    return get_config().to_dict() | TINY | changes


def test_the_default_configuration_makes_sense():
    default = get_config().to_dict()
    check(default)
    settings = list(all_settings(default))
    # Ghost batches of 16 need a larger batch.
    sizes = {s.batch_size for s in settings if s.method == "ghost"}
    assert sizes == {32, 128, 512}
    assert len(settings) == len(set(settings)) == 2 * (5 * 6 + 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_sizes": (4, 7)}, "expected a multiple of every batch size, and 7"),
        ({"batch_sizes": (1,)}, "batch_sizes=.*at least 2"),
        (
            {"methods": ("batch_norm", "none")},
            "methods=.*: expected some of batch_norm, ",
        ),
        ({"orders": ("sorted",)}, "orders=.*: expected some of shuffled, "),
        (
            {"learning_rates": ()},
            "learning_rates=.*expected at least one value: a positive",
        ),
        ({"num_seeds": 0}, "num_seeds=0: expected at least 1"),
        ({"statistics_memory": -1}, "expected a positive number"),
    ],
)
def test_configurations_that_make_no_sense(changes, message):
    with pytest.raises(ConfigError, match=message):
        check(config(**changes))


def test_too_few_or_too_large_images(tiny_images):
    with pytest.raises(ConfigError, match="expected fewer than the 60"):
        split(tiny_images, config(validation_examples=60))
    large = tiny_images._replace(train_images=np.zeros((60, 40, 28, 1), np.uint8))
    with pytest.raises(ConfigError, match="at most 32 x 32"):
        split(large, config())


def test_images_are_centred_and_split(tiny_images):
    data = split(tiny_images, config())
    assert data.train_images.shape == (40, 32, 32, 1)
    assert data.validation_images.shape == (20, 32, 32, 1)
    np.testing.assert_allclose(
        data.test_images[:, 2:-2, 2:-2], tiny_images.test_images / np.float32(255)
    )
    assert float(data.test_images.sum()) == pytest.approx(
        float(data.test_images[:, 2:-2, 2:-2].sum())
    )


def test_orders():
    labels = np.arange(1000) % 10
    options = config(num_examples=4096, skewed_classes=2)
    shuffled = make_order(labels, "shuffled", options, 32, seed=0)
    skewed = make_order(labels, "skewed", options, 32, seed=0)
    assert shuffled.shape == skewed.shape == (128, 32)
    classes = [len(np.unique(labels[batch])) for batch in shuffled]
    assert min(classes) > 5
    assert {len(np.unique(labels[batch])) for batch in skewed} == {2}
    # Every class comes about as often as the others.
    for order in (shuffled, skewed):
        shares = np.bincount(labels[order].ravel()) / order.size
        assert abs(shares - 0.1).max() < 0.04
    again = make_order(labels, "skewed", options, 32, seed=0)
    np.testing.assert_array_equal(skewed, again)
    assert (make_order(labels, "skewed", options, 32, seed=1) != skewed).any()


@pytest.mark.slow
def test_a_run_goes_on_where_it_was(tiny_images, tmp_path, monkeypatch, capsys):
    options = config(orders=("shuffled",))
    train, trained = training.train_setting, []

    def run_tiny(config):
        run(config, tmp_path, None, load=lambda *_: tiny_images)

    def stop_after_two(setting, *args):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(setting)
        return train(setting, *args)

    with monkeypatch.context() as patch:
        patch.setattr(training, "train_setting", stop_after_two)
        with pytest.raises(KeyboardInterrupt):
            run_tiny(options)
    first = read_rows(tmp_path / "results.jsonl")
    # A killed process may leave half a row.
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"method": "ren')

    run_tiny(options)
    rows = read_rows(tmp_path / "results.jsonl")
    assert rows[:2] == first  # with the seconds that these took
    found = [Setting(*(row[field] for field in Setting._fields)) for row in rows]
    assert found == list(all_settings(options))
    assert found[0] == Setting("batch_norm", "shuffled", 4)
    assert len(found) == 7
    for row in rows:
        assert np.shape(row["validation"]) == np.shape(row["test"]) == (2, 2)
    # 64 examples teach nothing for sure, but some setting sees the bars.
    assert max(np.max(row["test"]) for row in rows) > 60
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert len(summary["results"]) == 7
    assert "| batch size" in capsys.readouterr().out
    for name in ("batch_size.png", "batch_size.svg", "batch_size.md"):
        assert (tmp_path / name).stat().st_size > 0
    # Finished: nothing is trained, and the same is written.
    monkeypatch.setattr(training, "train_setting", stop_after_two)
    run_tiny(options)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    with pytest.raises(WorkdirError, match="another configuration"):
        run_tiny(config())
