import io
import itertools

import numpy as np
import PIL.Image
import pytest

from experiments.inception.comparison import figures
from experiments.inception.comparison.models import compare, compare_rates
from experiments.running.figures import save
from tests.experiments.helpers import read_files
from tests.experiments.inception.comparison.test_models import (
    REFERENCE,
    baselines,
    diverged,
    make_run,
)


@pytest.fixture
def comparison():
    runs = [
        *REFERENCE,
        make_run("bn_x5", {0: 10, 5: 74, 10: 80}),
        make_run("bn_x5_sigmoid", {0: 10, 10: 30, 30: 60}),
        make_run("inception_x5", {0: 10, 10: 12}, summary=diverged(17)),
        make_run("inception_sigmoid", {0: 10, 30: 11}),
    ]
    return compare(runs)


@pytest.fixture
def rates():
    runs = [
        make_run("inception", {0: 10, 10: 60}, learning_rate=0.01),
        make_run("inception", {0: 10, 10: 70}, learning_rate=0.1, seed=1),
        make_run("inception", {0: 10, 10: 74}, learning_rate=0.1),
        make_run("inception", {0: 10, 10: 71}, learning_rate=1.0, summary=diverged(12)),
        make_run("bn_x5", {0: 10, 10: 80}, learning_rate=0.1),
        make_run("bn_x5", {0: 10, 10: 85}, learning_rate=1.0, summary=None),
        make_run("bn_x5", {0: 10, 10: 9}, learning_rate=10.0),
    ]
    return compare_rates(runs)


def curves_of(axes) -> dict:
    """The lines of models, by their entry in the legend."""
    return {
        line.get_label(): line
        for line in axes.get_lines()
        if not line.get_label().startswith("_") and len(line.get_xdata()) > 1
    }


def marks_of(axes, marker) -> list[tuple]:
    """Where marks of one form lie, and their colours."""
    return [
        (line.get_xdata()[0], line.get_ydata()[0], line.get_color())
        for line in axes.get_lines()
        if line.get_marker() == marker and np.isfinite(line.get_ydata()[0])
    ]


def legend_of(figure) -> list[str]:
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


def words_of(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_figure2_has_a_curve_a_model(comparison):
    axes, beginning = figures.figure2(comparison).axes
    for panel in axes, beginning:
        curves = list(curves_of(panel).values())
        assert len(curves) == len(comparison["models"]) == 5
        for curve, model in zip(curves, comparison["models"], strict=True):
            assert list(curve.get_xdata()) == model["curve"]["steps"]
            assert list(curve.get_ydata()) == model["curve"]["mean"]
    assert 30 < axes.get_xlim()[1] < 31
    # The longest of the runs that are short as they were meant to be.
    assert 10 < beginning.get_xlim()[1] < 11
    low, high = axes.get_ylim()
    assert low < 0
    assert high > 80


def test_the_second_panel_shows_all_of_the_short_runs():
    runs = [
        *REFERENCE,
        make_run("bn_x5", {0: 1, 10: 2}),
        make_run("bn_x30", {0: 1, 5: 2}),
    ]
    _, beginning = figures.figure2(compare(runs)).axes
    assert 10 < beginning.get_xlim()[1] < 11


def test_figure2_has_one_panel_if_no_run_is_short():
    runs = [*REFERENCE, make_run("bn_x5", {0: 1, 10: 2}, summary=None)]
    assert len(figures.figure2(compare(runs)).axes) == 1


def test_a_band_shows_the_spread_of_seeds(comparison):
    axes, _ = figures.figure2(comparison).axes
    (band,) = axes.collections  # the other models have one seed
    vertices = band.get_paths()[0].vertices
    at_ten = vertices[vertices[:, 0] == 10][:, 1]
    assert at_ten.min() == pytest.approx(52 - np.sqrt(8))
    assert at_ten.max() == pytest.approx(52 + np.sqrt(8))


def test_figure2_marks_who_reaches_the_level_and_who_diverges(comparison):
    figure = figures.figure2(comparison)
    axes, _ = figure.axes
    colors = [curve.get_color() for curve in curves_of(axes).values()]
    names = [model["name"] for model in comparison["models"]]
    color = dict(zip(names, colors, strict=True))
    assert marks_of(axes, "D") == [
        (20, 72, color["inception"]),
        (5, 74, color["bn_x5"]),
    ]
    assert marks_of(axes, "X") == [(10, 12, color["inception_x5"])]
    assert legend_of(figure) == [
        "inception",
        "bn_x5",
        "bn_x5_sigmoid",
        "inception_x5\ndiverged at step 17",
        "inception_sigmoid\nstayed at chance",
        "first to reach 72.00%",
        "diverged after this evaluation",
    ]


def test_figures_have_the_digits_that_the_table_needs():
    runs = [*REFERENCE, make_run("bn_x5", {0: 10, 20: 71.996})]
    comparison = compare(runs)
    assert "first to reach 72.000%" in legend_of(figures.figure2(comparison))
    left, right = figures.figure3(comparison).axes
    assert left.get_xlabel() == "steps to 72.000%\n(inception)"
    assert words_of(right) == ["72.000 ± 2.828", "71.996"]


def test_ten_models_look_different():
    looks = [tuple(figures.line_style(index).items()) for index in range(10)]
    assert len(set(looks)) == 10
    assert len({look["color"] for look in map(dict, looks)}) == 10


def test_figure3_has_bars_with_their_numbers(comparison):
    left, right = figures.figure3(comparison).axes
    assert [bar.get_width() for bar in left.patches] == [20, 5]
    assert words_of(left) == [
        *("20 (1.00x)", "5 (4.00x)", "never"),
        *("diverged at step 17", "stayed at chance"),
    ]
    assert [bar.get_width() for bar in right.patches] == [72, 80, 60, 12, 11]
    assert words_of(right) == ["72.00 ± 2.83", "80.00", "60.00", "12.00", "11.00"]
    names = [label.get_text() for label in left.get_yticklabels()]
    assert names == [model["name"] for model in comparison["models"]]
    assert left.get_xscale() == "linear"
    assert left.get_xlabel() == "steps to 72.00%\n(inception)"
    # The first model is at the top.
    assert left.get_ylim()[0] > left.get_ylim()[1]


def test_figure3_has_a_logarithmic_axis_where_bars_would_vanish():
    runs = [
        make_run("inception", {0: 10, 60_000: 72}),
        make_run("bn_x5", {0: 10, 1_000: 80}),
    ]
    left, _ = figures.figure3(compare(runs)).axes
    assert left.get_xscale() == "log"
    start = left.get_xlim()[0]
    assert start == 100
    ends = [bar.get_x() + bar.get_width() for bar in left.patches]
    assert ends == [60_000, 1_000]
    assert [bar.get_x() for bar in left.patches] == [start, start]


def test_a_reference_that_never_learnt_has_no_panel_and_no_mark():
    runs = [make_run("inception", {0: 10}), make_run("bn_x5", {0: 9, 10: 90})]
    comparison = compare(runs)
    (accuracy,) = figures.figure3(comparison).axes
    assert words_of(accuracy) == ["10.00", "90.00"]
    figure = figures.figure2(comparison)
    assert legend_of(figure) == ["inception\nstayed at chance", "bn_x5"]


def test_two_references_have_a_panel_and_a_mark_each():
    runs = [*baselines(40, 70), make_run("bn_x5", {0: 10, 5: 40, 15: 70})]
    comparison = compare(runs)
    *panels, last = figures.figure3(comparison).axes
    assert [words_of(panel) for panel in panels] == [
        ["20 (1.00x)", "10 (2.00x)", "5 (4.00x)"],
        ["never", "30 (1.00x)", "15 (2.00x)"],
    ]
    assert len(last.patches) == 3
    figure = figures.figure2(comparison)
    axes = figure.axes[0]
    assert [mark[:2] for mark in marks_of(axes, "D")] == [(20, 40), (10, 69), (5, 40)]
    assert [mark[:2] for mark in marks_of(axes, "v")] == [(30, 70), (15, 70)]
    assert legend_of(figure)[-2:] == ["first to reach 40.00%", "first to reach 70.00%"]


def test_rates_have_a_line_a_family_and_crosses_for_failures(rates):
    figure = figures.accuracy_against_rate(rates)
    axes, failures = figure.axes
    assert axes.get_xscale() == "log"
    inception, bn = (container.lines[0] for container in axes.containers)
    assert list(inception.get_xdata()) == [0.03, 0.3, 3]
    np.testing.assert_array_equal(inception.get_ydata().astype(float), [60, 72, np.nan])
    np.testing.assert_array_equal(bn.get_ydata().astype(float), [80, 85, np.nan])
    colors = [line.get_color() for line in (inception, bn)]
    assert marks_of(failures, "x") == [(3, 0, colors[0])]
    assert marks_of(failures, "+") == [(30, 1, colors[1])]
    assert marks_of(axes, "s") == [(3, 85, colors[1])]
    assert [text.get_text() for text in failures.get_xticklabels()] == [
        *("0.03", "0.3", "3", "30")
    ]
    assert legend_of(figure) == [
        *("inception", "bn_x5", "diverged", "stayed at chance", "not finished")
    ]


def test_rates_without_failures_have_one_panel():
    runs = [
        make_run("bn_x5", {0: 10, 10: 80}, learning_rate=rate) for rate in (1.0, 2.0)
    ]
    figure = figures.accuracy_against_rate(compare_rates(runs))
    assert len(figure.axes) == 1
    assert legend_of(figure) == ["bn_x5"]


def test_long_names_and_words_are_broken(comparison):
    long = " ".join(["word"] * 20)
    model = comparison["models"][3]
    model |= {"name": long, "state": long}
    model["reach"][0]["outcome"] = long
    left, _ = figures.figure3(comparison).axes
    for text in (left.get_yticklabels()[3].get_text(), words_of(left)[3]):
        assert text.count("\n") == 2
        assert text.replace("\n", " ") == long
    entry = legend_of(figures.figure2(comparison))[3]
    assert entry.replace("\n", " ") == f"{long} {long}"
    assert max(map(len, entry.split("\n"))) <= figures.LINE_WIDTH


@pytest.mark.parametrize(
    ("value", "label"),
    {
        0: "0",
        500: "500",
        1_000: "1K",
        2_500: "2.5K",
        31e6: "31M",
        1.5e6: "1.5M",
    }.items(),
)
def test_steps_on_the_axis(value, label, comparison):
    axes, _ = figures.figure2(comparison).axes
    assert axes.xaxis.get_major_formatter()(value, 0) == label


def test_files_are_valid_and_always_the_same(tmp_path, comparison, rates):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        save(figures.figure2(comparison), tmp_path / folder / "figure2")
        save(figures.figure3(comparison), tmp_path / folder / "figure3")
        save(figures.accuracy_against_rate(rates), tmp_path / folder / "rates")
    files = read_files(tmp_path / "a")
    assert len(files) == 6
    assert read_files(tmp_path / "b") == files
    for name, content in files.items():
        if name.endswith("png"):
            PIL.Image.open(io.BytesIO(content)).verify()
        else:
            assert content.rstrip().endswith(b"</svg>")


def test_nothing_is_cut_off_and_no_words_overlap(comparison):
    """Every text lies within the figure, and those of a panel lie apart."""
    figure = figures.figure3(comparison)
    figure.savefig(io.BytesIO(), format="png")
    for axes in figure.axes:
        boxes = [text.get_window_extent() for text in axes.texts]
        for box in boxes:
            assert axes.bbox.x0 <= box.x0
            assert box.x1 <= axes.bbox.x1
        for one, other in itertools.pairwise(boxes):
            assert not one.overlaps(other)
