import io
import itertools

import numpy as np
import PIL.Image
import pytest

from experiments.inception.ensembles.tables import PAPER, figure4, figure4_page
from experiments.running.figures import save
from tests.experiments.helpers import read_files


def make_row(model, crops, models, top1_error, top5_error):
    return {
        "model": model,
        "resolution": 64,
        "crops": crops,
        "models": models,
        "top1_error": top1_error,
        "top5_error": top5_error,
    }


def make_numbers(**test_set):
    return {
        "test_set": {
            "dataset": "cluttered_mnist",
            "classes": 10,
            "examples": 10_000,
            "evaluated": 10_000,
            "undecodable": 0,
            "crop_fraction": 1.0,
            "flip": True,
        }
        | test_set,
        "networks": [
            {
                "name": "bn_x5",
                "folder": "runs/bn_x5",
                "seed": 0,
                "step": 1_200,
                "num_steps": 1_200,
                "statistics": "population",
            },
            {
                "name": "inception",
                "folder": "runs/inception",
                "seed": 0,
                "step": 500,
                "num_steps": 6_200,
                "statistics": None,
            },
        ],
        "rows": [
            make_row("bn_x5", 1, 1, 12.345, 1.0),
            make_row("inception", 1, 1, 20.0, 2.0),
            make_row("ensemble", 1, 2, 10.0, 0.5),
            make_row("bn_x5", 10, 1, 11.0, 0.75),
            make_row("inception", 10, 1, 18.0, 1.5),
            make_row("ensemble", 10, 2, 9.0, 0.25),
        ],
    }


@pytest.fixture
def numbers():
    return make_numbers()


def tables_of(page):
    """The cells of each table, by its header's first cell."""
    lines = [line for line in page.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    starts = [index - 1 for index, row in enumerate(rows) if set(row[0]) == {"-"}]
    ends = [*starts[1:], len(rows)]
    return [
        [row for row in rows[start:end] if set(row[0]) != {"-"}]
        for start, end in zip(starts, ends, strict=True)
    ]


def words_of(axes):
    return [text.get_text() for text in axes.texts]


def lengths_of(axes):
    return [bar.get_width() for bar in axes.patches]


def labels_of(axes):
    return [label.get_text() for label in axes.get_yticklabels()]


def legend_of(figure):
    (legend,) = figure.legends
    return {
        text.get_text(): patch.get_facecolor()
        for text, patch in zip(legend.get_texts(), legend.get_patches(), strict=True)
    }


def test_the_table_has_the_form_of_figure_4(numbers):
    table, _ = tables_of(figure4_page(numbers))
    assert table == [
        ["model", "resolution", "crops", "models", "top-1 error", "top-5 error"],
        ["bn_x5", "64", "1", "1", "12.35%", "1.00%"],
        ["inception", "64", "1", "1", "20.00%", "2.00%"],
        ["ensemble", "64", "1", "2", "10.00%", "0.50%"],
        ["bn_x5", "64", "10", "1", "11.00%", "0.75%"],
        ["inception", "64", "10", "1", "18.00%", "1.50%"],
        ["ensemble", "64", "10", "2", "9.00%", "0.25%"],
        # The paper's, as it prints them.
        ["paper: GoogLeNet ensemble", "224", "144", "7", "—", "6.67%"],
        ["paper: Deep Image low-res", "256", "—", "1", "—", "7.96%"],
        ["paper: Deep Image high-res", "512", "—", "1", "24.88%", "7.42%"],
        ["paper: Deep Image ensemble", "variable", "—", "—", "—", "5.98%"],
        ["paper: BN-Inception", "224", "1", "1", "25.2%", "7.82%"],
        ["paper: BN-Inception", "224", "144", "1", "21.99%", "5.82%"],
        ["paper: BN-Inception ensemble", "224", "144", "6", "20.1%", "4.9%"],
        [
            *("paper: BN-Inception ensemble, test server", "224", "144", "6"),
            *("—", "4.82%"),
        ],
    ]


def test_the_page_says_which_networks_these_are(numbers):
    _, table = tables_of(figure4_page(numbers))
    assert table == [
        ["network", "run", "steps", "statistics at inference"],
        ["bn_x5", "runs/bn_x5", "1,200", "of the population (Algorithm 2)"],
        ["inception", "runs/inception", "500 of 6,200", "none: no batch normalisation"],
    ]
    numbers["networks"][1]["statistics"] = "moving_average"
    assert tables_of(figure4_page(numbers))[1][2][-1] == "moving averages"


@pytest.mark.parametrize(
    ("test_set", "expected", "unexpected"),
    [
        (
            {},
            ["Data: cluttered_mnist, all 10,000 test examples."],
            ["decoded", "mirrored"],
        ),
        (
            {"evaluated": 197, "undecodable": 3},
            ["the first 200 of 10,000 test examples", "3 of them could not be decoded"],
            ["mirrored"],
        ),
        (
            {"evaluated": 9_999, "undecodable": 1},
            ["all 10,000 test examples", "1 of them could not be decoded"],
            [],
        ),
        ({"flip": False}, ["must not be mirrored"], ["decoded"]),
    ],
)
def test_the_page_says_what_was_measured(test_set, expected, unexpected):
    page = figure4_page(make_numbers(**test_set))
    assert page.endswith("|\n")
    assert "![Errors of networks and their ensemble](figure4.png)" in page
    for words in expected:
        assert words in page
    for words in unexpected:
        assert words not in page


def test_mirrors_are_no_matter_with_one_crop(numbers):
    numbers["test_set"]["flip"] = False
    numbers["rows"] = numbers["rows"][:3]
    assert "mirrored" not in figure4_page(numbers)


def test_the_picture_has_a_bar_a_row_side_by_side_for_each_model(numbers):
    figure = figure4(numbers)
    left, right = figure.axes
    assert lengths_of(left) == [12.345, 11, 20, 18, 10, 9]
    assert lengths_of(right) == [1, 0.75, 2, 1.5, 0.5, 0.25]
    assert words_of(left) == ["12.35", "11.00", "20.00", "18.00", "10.00", "9.00"]
    assert labels_of(left) == ["bn_x5", "inception", "ensemble of 2"]
    middles = [bar.get_y() + bar.get_height() / 2 for bar in left.patches]
    assert middles == pytest.approx([0, 1, 3, 4, 6, 7])
    assert list(left.get_yticks()) == [0.5, 3.5, 6.5]
    assert left.get_ylim()[0] > 7.4
    assert left.get_ylim()[1] < -0.4
    assert (left.get_xlabel(), right.get_xlabel()) == (
        "top-1 error, %",
        "top-5 error, %",
    )
    legend = legend_of(figure)
    assert list(legend) == ["1 crop", "10 crops"]
    colors = [bar.get_facecolor() for bar in left.patches]
    assert colors == [legend["1 crop"], legend["10 crops"]] * 3
    assert len(set(legend.values())) == 2


def test_the_papers_bars_stand_beside_those_of_its_data():
    left, right = figure4(make_numbers(dataset="imagenet2012")).axes
    assert labels_of(left)[3:] == [
        "paper: GoogLeNet ensemble of 7",
        "paper: Deep Image low-res",
        "paper: Deep Image high-res",
        "paper: Deep Image ensemble",
        "paper: BN-Inception",
        "paper: BN-Inception ensemble of 6",
        "paper: BN-Inception ensemble, test\nserver of 6",
    ]
    errors = [0, 0, 24.88, 0, 25.2, 21.99, 20.1, 0]
    assert lengths_of(left)[6:] == errors
    assert words_of(left)[6:] == [f"{e:.2f}" if e else "—" for e in errors]
    assert lengths_of(right)[6:] == [6.67, 7.96, 7.42, 5.98, 7.82, 5.82, 4.9, 4.82]
    assert "crops not given" in legend_of(left.figure)


def test_errors_of_zero_can_be_drawn(numbers):
    numbers["rows"] = [make_row("bn_x5", 1, 1, 5.0, 0.0)]
    left, right = figure4(numbers).axes
    assert words_of(right) == ["0.00"]
    assert right.get_xlim() == (0, 1)
    assert left.get_xlim() == (0, 6.25)


def test_no_error_is_above_100_percent(numbers):
    numbers["rows"] = [make_row("bn_x5", 1, 1, 100.0, 0.1)]
    for axes in figure4(numbers).axes:
        assert max(axes.get_xticks()) <= 100
        assert axes.get_xlim()[1] == 1.25 * axes.patches[0].get_width()


def test_files_are_valid_and_always_the_same(tmp_path, numbers):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        save(figure4(numbers), tmp_path / folder / "figure4")
    files = read_files(tmp_path / "a")
    assert files.keys() == {"figure4.png", "figure4.svg"}
    assert read_files(tmp_path / "b") == files
    PIL.Image.open(io.BytesIO(files["figure4.png"])).verify()
    assert files["figure4.svg"].rstrip().endswith(b"</svg>")


@pytest.mark.parametrize("dataset", ["cluttered_mnist", "imagenet2012"])
def test_nothing_is_cut_off_and_no_words_overlap(dataset):
    figure = figure4(make_numbers(dataset=dataset))
    figure.savefig(io.BytesIO(), format="png")
    for axes in figure.axes:
        boxes = [text.get_window_extent() for text in axes.texts]
        for box in boxes:
            assert axes.bbox.x0 <= box.x0
            assert box.x1 <= axes.bbox.x1
        for one, other in itertools.pairwise(boxes):
            assert not one.overlaps(other)
    labels = figure.axes[0].get_yticklabels()
    boxes = [label.get_window_extent() for label in labels]
    assert min(box.x0 for box in boxes) >= 0
    for one, other in itertools.pairwise(boxes):
        assert not one.overlaps(other)


def test_the_papers_rows():
    """Each of its networks improves on the one before it, and 144 crops on one."""
    networks = [row for row in PAPER if row["model"].startswith("BN-Inception")]
    for key in ("top1_error", "top5_error"):
        assert (np.diff([row[key] for row in networks if row[key]]) < 0).all()
    assert [row["top5_error"] for row in networks][-2:] == [4.9, 4.82]
