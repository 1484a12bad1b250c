"""The paper's figure 4, ours beside theirs: a page of Markdown, and a picture."""

import textwrap
from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from experiments.inception.comparison.figures import COLORS, LINE_WIDTH
from experiments.running.tables import NOTHING, table

UNKNOWN_COLOR = "0.6"  # of bars whose number of crops the paper does not give
PAPER_DATASET = "imagenet2012"
COLUMNS = ("model", "resolution", "crops", "models")
ERRORS = {"top1_error": "top-1 error", "top5_error": "top-5 error"}
STATISTICS = {
    "population": "of the population (Algorithm 2)",
    "moving_average": "moving averages",
    None: "none: no batch normalisation",
}


def _paper_row(
    model: str,
    crops: int | None,
    models: int | None,
    top1_error: float | None,
    top5_error: float,
    resolution: int | str = 224,
) -> dict[str, Any]:
    return {
        "model": model,
        "resolution": resolution,
        "crops": crops,
        "models": models,
        "top1_error": top1_error,
        "top5_error": top5_error,
    }


# What it leaves out is None. Its 4.82% stands in a note below the figure.
PAPER = (
    _paper_row("GoogLeNet ensemble", 144, 7, None, 6.67),
    _paper_row("Deep Image low-res", None, 1, None, 7.96, 256),
    _paper_row("Deep Image high-res", None, 1, 24.88, 7.42, 512),
    _paper_row("Deep Image ensemble", None, None, None, 5.98, "variable"),
    _paper_row("BN-Inception", 1, 1, 25.2, 7.82),
    _paper_row("BN-Inception", 144, 1, 21.99, 5.82),
    _paper_row("BN-Inception ensemble", 144, 6, 20.1, 4.9),
    _paper_row("BN-Inception ensemble, test server", 144, 6, None, 4.82),
)

Numbers = Mapping[str, Any]
Row = Mapping[str, Any]


def figure4_page(numbers: Numbers) -> str:
    """Figure 4's table with the paper's rows below ours.

    Args:
      numbers: as `experiments.inception.ensembles.errors.evaluate` makes them.
    """
    header = [*COLUMNS, *ERRORS.values()]
    ours = [_cells(row, ".2f") for row in numbers["rows"]]
    theirs = [
        _cells({**row, "model": f"paper: {row['model']}"}, "g")  # as it is printed
        for row in PAPER
    ]
    networks = [
        [network["name"], network["folder"], _steps(network), _statistics(network)]
        for network in numbers["networks"]
    ]
    return (
        "\n\n".join(
            [
                "# Networks and their ensemble",
                " ".join(_explanation(numbers)),
                table(header, ours + theirs),
                "![Errors of networks and their ensemble](figure4.png)",
                "## Networks",
                table(["network", "run", "steps", "statistics at inference"], networks),
            ]
        )
        + "\n"
    )


def figure4(numbers: Numbers) -> Figure:
    """Bars: both errors of every model, a colour a number of crops.

    The paper's models are there too if the data are the paper's.

    Args:
      numbers: as `experiments.inception.ensembles.errors.evaluate` makes them.
    """
    rows = list(numbers["rows"])
    if numbers["test_set"]["dataset"] == PAPER_DATASET:
        rows += [{**row, "model": f"paper: {row['model']}"} for row in PAPER]
    models = list(dict.fromkeys((row["model"], row["models"]) for row in rows))
    crops = sorted({row["crops"] for row in rows if row["crops"]})
    color = dict(zip(crops, COLORS[1:], strict=False)) | {None: UNKNOWN_COLOR}
    handles = [
        Patch(color=color[number], label=f"{number} crop{'s' * (number > 1)}")
        for number in crops
    ]
    if any(row["crops"] is None for row in rows):
        handles.append(Patch(color=UNKNOWN_COLOR, label="crops not given"))
    # Bars of one model lie together, a place apart from the next model's.
    places, middles, next_place = [], [], 0
    for model in models:
        own = [row for row in rows if (row["model"], row["models"]) == model]
        places += [(next_place + index, row) for index, row in enumerate(own)]
        middles.append(next_place + (len(own) - 1) / 2)
        next_place += len(own) + 1
    figure = Figure(figsize=(10, 1.2 + 0.3 * next_place), layout="constrained")
    panels = figure.subplots(1, len(ERRORS), sharey=True)
    for panel, (key, label) in zip(panels, ERRORS.items(), strict=True):
        for place, row in places:
            _draw_bar(panel, place, row[key], color[row["crops"]])
        highest = max(row[key] or 0 for row in rows)
        end = 1.25 * highest or 1  # with room for the numbers
        panel.set_xlim(0, end)
        ticks = panel.get_xticks()
        panel.set_xticks([tick for tick in ticks if tick <= min(end, 100)])
        panel.set_xlabel(f"{label}, %")
    panels[0].set_yticks(middles, [_label(*model) for model in models])
    panels[0].set_ylim(next_place - 1.25, -0.75)
    figure.legend(handles=handles, loc="outside right upper", fontsize="small")
    return figure


def _cells(row: Row, form: str) -> list[str]:
    errors = [NOTHING if row[key] is None else f"{row[key]:{form}}%" for key in ERRORS]
    return [
        *(str(row[key] or NOTHING) for key in COLUMNS),
        *errors,
    ]


def _explanation(numbers: Numbers) -> list[str]:
    test_set = numbers["test_set"]
    every, undecodable = test_set["examples"], test_set["undecodable"]
    evaluated = test_set["evaluated"] + undecodable
    which = "all" if evaluated == every else f"the first {evaluated:,} of"
    sentences = [f"Data: {test_set['dataset']}, {which} {every:,} test examples."]
    if undecodable:
        sentences.append(
            f"{undecodable:,} of them could not be decoded and were left out."
        )
    sentences.append(
        "A prediction is the arithmetic mean of the class probabilities over crops, "
        "and that of an ensemble over its networks too."
    )
    if not test_set["flip"] and any(row["crops"] > 1 for row in numbers["rows"]):
        sentences.append(
            "These images must not be mirrored, which leaves half of the crops: 5 of "
            "10, 72 of 144."
        )
    sentences.append(
        "The paper's rows are those of ImageNet's validation images, but for the test "
        "server's; Deep Image is of Wu et al. (2015)."
    )
    return sentences


def _steps(network: Numbers) -> str:
    step, last = network["step"], network["num_steps"]
    return f"{step:,}" if step == last else f"{step:,} of {last:,}"


def _statistics(network: Numbers) -> str:
    return STATISTICS[network["statistics"]]


def _label(model: str, models: int | None) -> str:
    words = model if models in (1, None) else f"{model} of {models}"
    return textwrap.fill(words, LINE_WIDTH, break_long_words=False)


def _draw_bar(panel: Any, place: float, error: float | None, color: str) -> None:
    panel.barh(place, error or 0, color=color, height=0.8)
    panel.annotate(
        NOTHING if error is None else f"{error:.2f}",
        (error or 0, place),
        (4, 0),
        textcoords="offset points",
        va="center",
        fontsize="small",
    )
