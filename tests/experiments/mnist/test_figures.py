import io

import numpy as np
import PIL.Image
import pytest

from experiments.mnist import figures
from experiments.mnist.summary import summarise
from experiments.running.figures import save
from tests.experiments.helpers import read_files, small_config
from tests.experiments.mnist.test_summary import (
    REPLICAS,
    make_percentiles,
    make_rows,
)


@pytest.fixture
def one_setting():
    replicas = {name: values[:2] for name, values in REPLICAS.items()}
    rows = [
        row | {"accuracy": row["accuracy"][:2], "step": 1_000 * row["step"]}
        for row in make_rows()
    ]
    percentiles = make_percentiles(replicas=2)
    return rows, percentiles, summarise(small_config(), replicas, rows, percentiles)


@pytest.fixture
def several_settings():
    return summarise(small_config(num_steps=30), REPLICAS, make_rows(), [])


def test_figure1_has_the_papers_panels(one_setting):
    accuracy, without, with_norm = figures.figure1(*one_setting).axes
    assert accuracy.get_ylim() == (0.7, 1)
    assert accuracy.get_xlim() == (0, 30_000)
    assert "(a)" in accuracy.get_title()
    assert "(b)" in without.get_title()
    assert "without BN" in without.get_title()
    assert "(c)" in with_norm.get_title()
    assert "with BN" in with_norm.get_title()
    assert without.get_ylim() == with_norm.get_ylim()
    low, high = without.get_ylim()
    assert low <= -2
    assert high >= 2


def test_accuracy_is_a_mean_with_a_band(one_setting):
    panel = figures.figure1(*one_setting).axes[0]
    without, with_norm = panel.get_lines()
    assert without.get_label() == "without BN"
    assert with_norm.get_label() == "with BN"
    np.testing.assert_allclose(with_norm.get_xdata(), [0, 10e3, 20e3, 30e3])
    np.testing.assert_allclose(with_norm.get_ydata(), [0.11, 0.9, 0.95, 0.9625])
    band = panel.collections[1].get_paths()[0].vertices
    at_end = band[band[:, 0] == 30e3][:, 1]
    spread = np.std([0.955, 0.97], ddof=1)
    assert at_end.min() == pytest.approx(0.9625 - spread)
    assert at_end.max() == pytest.approx(0.9625 + spread)


def test_percentiles_are_those_of_the_first_seeds_typical_unit(one_setting):
    _, *panels = figures.figure1(*one_setting).axes
    for panel in panels:
        lines = panel.get_lines()
        for percentile, line in enumerate(lines):
            expected = [percentile, percentile + 2, percentile + 1]
            np.testing.assert_allclose(line.get_ydata(), expected)
        assert [line.get_label()[:4] for line in lines] == ["15th", "50th", "85th"]


def test_without_percentiles_only_accuracy_is_drawn(one_setting):
    rows, _, summary = one_setting
    (panel,) = figures.figure1(rows, [], summary).axes
    assert panel.get_ylim() == (0.7, 1)


def test_one_seed_and_missing_values(one_setting):
    """A diverged network's percentiles are null."""
    rows, percentiles, _ = one_setting
    replicas = {name: values[:1] for name, values in REPLICAS.items()}
    rows = [row | {"accuracy": row["accuracy"][:1]} for row in rows]
    nothing = np.full((1, 3, 5), None).tolist()
    percentiles = [row | {"values": nothing} for row in percentiles]
    summary = summarise(small_config(), replicas, rows, percentiles)
    figure = figures.figure1(rows, percentiles, summary)
    figure.savefig(io.BytesIO(), format="png")


def test_accuracy_against_rate(several_settings):
    (panel,) = figures.accuracy_against_rate(several_settings).axes
    assert panel.get_xscale() == "log"
    assert panel.get_ylim() == (0, 100)
    assert "0.5" in panel.get_title()
    for container in panel.containers:
        line = container.lines[0]
        assert list(line.get_xdata()) == [0.1, 3]
        assert list(line.get_ydata()) == [96.25, 59.5]
    assert {text.get_text() for text in panel.get_legend().get_texts()} == {
        "without BN",
        "with BN",
    }


def test_a_panel_a_deviation():
    replicas = REPLICAS | {"initial_std": np.array([0.5, 0.5, 0.01, 0.01])}
    summary = summarise(small_config(num_steps=30), replicas, make_rows(), [])
    titles = [axes.get_title() for axes in figures.accuracy_against_rate(summary).axes]
    assert [title.split()[-1] for title in titles] == ["0.01", "0.5"]


def test_files_are_valid_and_always_the_same(tmp_path, one_setting):
    for folder in "a", "b":
        (tmp_path / folder).mkdir()
        save(figures.figure1(*one_setting), tmp_path / folder / "figure1")
    files = read_files(tmp_path / "a")
    assert files.keys() == {"figure1.png", "figure1.svg"}
    assert read_files(tmp_path / "b") == files
    image = PIL.Image.open(io.BytesIO(files["figure1.png"]))
    image.verify()
    width, height = image.size
    assert width > 1_500
    assert height > 400
    assert files["figure1.svg"].rstrip().endswith(b"</svg>")
