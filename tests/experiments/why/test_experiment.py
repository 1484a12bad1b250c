"""The run: what is measured stays, other parts may come, all of them are shown."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments.configuration.fields import ConfigError
from experiments.data.image_set import ImageSet
from experiments.running.metrics import read_rows
from experiments.running.workdir import WorkdirError, read_json
from experiments.why.config import CONFIGURATION, PARTS, get_config
from experiments.why.data import check, compose_digits, from_images, load
from experiments.why.experiment import PARTS as MEASURED_PARTS
from experiments.why.experiment import run
from experiments.why.part import Part
from experiments.why.subjects import looks_of


def config(**changes):
    return get_config().to_dict() | changes


def fake_part(name, calls, fails_at=None):
    def measure(config, data, setting):
        if setting["number"] == fails_at:
            raise KeyboardInterrupt
        calls.append((name, setting["number"]))
        return {"square": setting["number"] ** 2}

    def tables(rows):
        return " ".join(str(row["measured"]["square"]) for row in rows)

    def settings(config):
        return [{"number": number, "pair": (1, 2)} for number in (3, 4, 5)]

    return Part(f"Title of {name}", settings, measure, lambda rows: Figure(), tables)


def test_a_run_goes_on_where_it_was(tmp_path, capsys):
    calls = []
    stopping = {"depth": fake_part("depth", calls, fails_at=5)}
    with pytest.raises(KeyboardInterrupt):
        run(config(parts=("depth",)), tmp_path, None, stopping)
    assert calls == [("depth", 3), ("depth", 4)]
    # With another part, before it in the order of the page.
    parts = {name: fake_part(name, calls) for name in ("shift", "depth")}
    run(config(parts=("depth", "shift")), tmp_path, None, parts)
    assert calls[2:] == [("depth", 5), *(("shift", number) for number in (3, 4, 5))]
    assert "Title of depth" in capsys.readouterr().out
    page = (tmp_path / "why.md").read_text()
    assert page.index("Title of shift") < page.index("Title of depth")
    assert "9 16 25" in page
    for name in ("shift", "depth"):
        assert (tmp_path / f"{name}.png").stat().st_size > 0
        assert (tmp_path / f"{name}.svg").stat().st_size > 0
    assert set(read_json(tmp_path / "summary.json")["seconds"]) == {"shift", "depth"}
    # Finished: nothing is measured, and the same is written.
    run(config(parts=("shift",)), tmp_path, None, parts)
    assert len(calls) == 6
    assert (tmp_path / "why.md").read_text() == page
    assert len(read_rows(tmp_path / "results.jsonl")) == 6
    with pytest.raises(WorkdirError, match="another configuration: num_seeds"):
        run(config(num_seeds=1), tmp_path, None, parts)


def test_the_default_configuration_makes_sense():
    default = config()
    CONFIGURATION.check(default)
    check(default)
    assert tuple(MEASURED_PARTS) == PARTS
    for part in MEASURED_PARTS.values():
        settings = part.settings(default)
        assert settings
        assert all(settings.count(setting) == 1 for setting in settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parts": ("width",)}, "parts=.*: expected some of landscape, "),
        ({"depths": (1,)}, "depths=.*: expected at least 2"),
        ({"dropouts": (0.1, 1.0)}, "dropouts: expected shares below 1"),
        ({"batch_size": 60, "dropout_examples": 50}, "expected at most dropout_exam"),
        ({"inception_batch_size": 513}, "expected at most inception_examples"),
        ({"probe_examples": 60_001}, "expected at most the 60000 training examples"),
    ],
)
def test_configurations_that_make_no_sense(changes, message):
    with pytest.raises(ConfigError, match=message):
        run(config(**changes), None, None)


def test_looks():
    assert looks_of(100, 4) == [0, 25, 50, 75, 100]
    assert looks_of(2, 20) == [0, 1, 2]


def test_images():
    data = load(config(), None)
    assert data.training.images.shape == (60_000, 784)
    assert data.num_inputs == 784
    assert set(np.unique(data.test.images[:100])) == {0, 1}
    digits = compose_digits(config(inception_examples=4))
    again = compose_digits(config(inception_examples=6))
    assert digits.images.shape == (4, 32, 32, 3)
    assert -1 <= digits.images.min() < -0.5 < 0.5 < digits.images.max() <= 1
    np.testing.assert_array_equal(digits.images, again.images[:4])
    np.testing.assert_array_equal(digits.labels, data.training.labels[:4])


TINY = {
    "hidden": (6, 6),
    "batch_size": 16,
    "num_seeds": 2,
    "num_looks": 2,
    "probe_examples": 24,
    "learning_rates": (0.5,),
    "num_steps": 6,
    "networks": ("mnist",),
    "outside_steps": 60,
    "depths": (3, 4),
    "depth_activations": ("relu",),
    "depth_stds": (0.01, 1.4),
    "depth_width": 8,
    "depth_steps": 60,
    "order_activations": ("sigmoid",),
    "order_rates": (0.1, 1.0),
    "order_steps": 60,
    "dropouts": (0.0, 0.4),
    "dropout_examples": 32,
    "dropout_steps": 60,
}


@pytest.fixture(scope="module")
def bars():
    """Images whose class is the height of a bar."""
    random = np.random.default_rng(0)
    labels = np.arange(96, dtype=np.int32) % 3
    images = random.integers(0, 150, (96, 6, 6, 1)).astype(np.uint8)
    images[np.arange(96), 2 * labels, :] = 255
    return from_images(ImageSet(images, labels, images[:30], labels[:30], 3))


def measure(name, data, **changes):
    """The rows of a part, with its table and figure made of them."""
    part, tiny = MEASURED_PARTS[name], config(**TINY, **changes)
    rows = [
        {"setting": setting, "measured": part.measure(tiny, data, setting)}
        for setting in part.settings(tiny)
    ]
    assert part.tables(rows).count("\n") >= 3
    for panel in part.draw(rows).axes:
        low, high = panel.get_ylim()
        # Axes of accuracies end at 100.
        assert "%" not in panel.get_ylabel() or high == 100
        assert low < high
    return rows


@pytest.mark.slow
def test_landscape(bars):
    (row,) = measure("landscape", bars)
    assert row["measured"]["steps"] == [0, 3, 6]
    for measured in row["measured"]["networks"].values():
        values = {key: np.array(each) for key, each in measured.items()}
        assert all(each.shape == (3, 2) for each in values.values())
        assert (values["loss_low"] <= values["loss_high"]).all()
        assert (values["smoothness"] > 0).all()


@pytest.mark.slow
def test_shift(bars):
    (row,) = measure("shift", bars)
    for measured in row["measured"]["networks"].values():
        l2 = np.array(measured["l2"])
        assert l2.shape == (3, 2, 3)
        assert (l2[..., 0] < 1e-5).all()  # no layer before it
        assert (l2[..., 1:] > 1e-6).all()


@pytest.mark.slow
def test_outside(bars):
    biases, everything = measure("outside", bars, outside_rate=0.1)
    for row in (biases, everything):
        networks = row["measured"]["networks"]
        assert np.max(networks["batch_norm"]["bias"]) < 1e-5
        for name in ("mean_outside", "moments_outside"):
            assert np.min(networks[name]["bias"][-1]) > 1e-3
    for of in biases["measured"]["networks"].values():
        np.testing.assert_allclose(of["loss"][-1], of["loss"][0], rtol=1e-4)


@pytest.mark.slow
def test_depth(bars):
    rows = measure("depth", bars, epsilon=1e-6)
    found = {
        name: np.array([row["measured"]["networks"][name] for row in rows]).max((0, 1))
        for name in ("without", "batch_norm")
    }
    # Weights near 0: at the chance of three classes without.
    assert found["without"][0] < 40
    assert found["batch_norm"][0] > 90


@pytest.mark.slow
@pytest.mark.parametrize("name", ["order", "dropout"])
def test_accuracies(bars, name):
    rows = measure(name, bars)
    values = [np.ravel(each) for each in _leaves(rows[0]["measured"]["networks"])]
    assert max(value.max() for value in values) > 60


def _leaves(tree):
    if isinstance(tree, dict):
        return [leaf for each in tree.values() for leaf in _leaves(each)]
    return [tree]
