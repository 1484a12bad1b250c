"""The batch size experiment's numbers, table and figure, from rows worked by hand."""

import pytest

from experiments.batch_size.config import METHODS, get_config
from experiments.batch_size.network import NORMALISATIONS
from experiments.batch_size.summary import (
    LABELS,
    STYLES,
    draw,
    page,
    summarise,
)


def row(method, order, size, validation, test):
    return {
        "method": method,
        "order": order,
        "batch_size": size,
        "learning_rates": [0.1, 0.2, 0.4],
        "seeds": [0, 1],
        "validation": validation,
        "test": test,
        "seconds": 1.5,
    }


ROWS = [
    row("batch_norm", "shuffled", 2, [[50, 52], [60, 40], [9, 9]], [[1, 3]] * 3),
    row(
        "batch_norm",
        "shuffled",
        8,
        [[5, 5], [80, 80], [9, 9]],
        [[0, 0], [70, 74], [0, 0]],
    ),
    row(
        "batch_norm", "skewed", 2, [[1, 1], [2, 2], [3, 3]], [[0, 0], [0, 0], [30, 30]]
    ),
    row(
        "group_norm",
        "shuffled",
        8,
        [[90, 90], [80, 80], [9, 9]],
        [[91, 92], [0, 0], [0, 0]],
    ),
]


@pytest.fixture
def summary():
    return summarise(get_config().to_dict(), ROWS)


def test_rates_are_chosen_on_validation_images(summary):
    first, second, third, _ = summary["results"]
    assert first["learning_rate"] == 0.1  # mean 51 against 50
    assert first["rate_at_end_of_grid"]
    assert second["learning_rate"] == 0.2
    assert not second["rate_at_end_of_grid"]
    assert second["test"]["mean"] == 72
    assert second["test"]["std"] == pytest.approx(8**0.5)
    assert third["learning_rate"] == 0.4
    assert summary["seconds"] == 6


def test_table(summary):
    text = page(summary)
    assert "| batch normalisation | 2.0 ± 1.4 | 72.0 ± 2.8 |" in text
    assert "| group normalisation | —         | 91.5 ± 0.7 |" in text
    assert "## Batches of 2 classes each" in text
    assert "layer normalisation" not in text


def test_figure_has_a_panel_an_order(summary):
    figure = draw(summary)
    titles = [panel.get_title() for panel in figure.axes]
    assert titles == ["Shuffled batches", "Batches of 2 classes each"]
    (curve, *_), *_ = (c.lines for c in figure.axes[0].containers)
    assert list(curve.get_xdata()) == [2, 8]
    assert list(curve.get_ydata()) == [2, 72]


def test_every_method_has_a_label_and_a_style():
    methods = METHODS
    assert set(methods) == set(NORMALISATIONS) == set(LABELS) == set(STYLES)


def test_a_method_without_a_label_stands_in_table_and_figure():
    summary = summarise(
        get_config().to_dict(), [*ROWS, row("mine", "shuffled", 8, [[1, 1]], [[7, 9]])]
    )
    text = page(summary)
    assert "| mine " in text
    assert "8.0 ± 1.4" in text
    (panel, _) = draw(summary).axes
    assert "mine" in panel.get_legend_handles_labels()[1]
