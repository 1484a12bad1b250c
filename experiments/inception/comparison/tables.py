"""A comparison as a page of Markdown: figure 3's table with the paper's beside it."""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.inception.comparison.models import (
    BASELINE,
    FINISHED,
    PAPER,
    STATISTICS,
    PaperRow,
)
from experiments.running.tables import NOTHING, spread, table

NOT_IN_PAPER = PaperRow(None, None, NOTHING, None)
MAX_DIGITS = 6

Comparison = Mapping[str, Any]
Model = Mapping[str, Any]


def comparison_page(comparison: Comparison) -> str:
    """Figures 2 and 3 with their numbers.

    Args:
      comparison: as `experiments.inception.comparison.models.compare` makes it.
    """
    digits = digits_to_show(comparison)
    references = comparison["references"]
    paper_steps = PAPER[BASELINE].steps
    rows = []
    for model in comparison["models"]:
        paper = PAPER.get(model["variant"], NOT_IN_PAPER)
        paper_ratio = (paper_steps or 0) / paper.steps if paper.steps else None
        reached = [
            cell
            for each in model["reach"]
            for cell in (steps_in_words(each), _or_nothing(each["ratio"], ",.2f"))
        ]
        rows.append(
            [
                model["name"],
                f"{model['initial_rate']:g}",
                _or_nothing(paper.initial_rate, "g"),
                *reached,
                f"{paper.steps / 1e6:.1f}M" if paper.steps else paper.outcome,
                _or_nothing(paper_ratio, ".1f"),
                spread(model["best"], digits),
                f"{model['best']['step']:,}",
                _in_the_end(model),
                _or_nothing(paper.best, ".1f"),
            ]
        )
    header = [
        *("model", "initial rate", "paper"),
        *(
            cell
            for each in references
            for cell in (
                f"steps to {level_in_words(each, digits)} ({each['name']})",
                "ratio",
            )
        ),
        *("paper, to 72.2%", "ratio", "best accuracy, %", "at step", "in the end, %"),
        "paper",
    ]
    return (
        "\n\n".join(
            [
                "# Comparison",
                " ".join(_explanation(comparison)),
                "![Accuracy against steps](figure2.png)",
                table(header, rows),
                "![Steps to the references' best accuracy](figure3.png)",
                *_baselines_tried(comparison["baselines_tried"]),
                "## Runs",
                "Final accuracy on all test examples, top-1 / top-5 in %, by the "
                "statistics that inference normalises by: their moving average, those "
                "of the population (Algorithm 2), or those of the test batch itself. "
                "A network without batch normalisation has none; its accuracy stands "
                "in the first column.",
                _final_table(comparison["models"]),
            ]
        )
        + "\n"
    )


def rates_page(comparison: Comparison) -> str:
    """Best accuracy for every learning rate.

    Args:
      comparison: as `experiments.inception.comparison.models.compare_rates` makes it.
    """
    families = comparison["families"]
    cells: dict[float, dict[str, str]] = {}
    for family in families:
        complete = [point for point in family["points"] if point["state"] == FINISHED]
        highest = max((point["best"]["mean"] for point in complete), default=None)
        for point in family["points"]:
            cell = spread(point["best"])
            if point["state"] != FINISHED:
                cell = f"{point['state']} ({cell})"
            elif point["best"]["mean"] == highest:
                cell = f"**{cell}**"
            cells.setdefault(point["initial_rate"], {})[family["name"]] = cell
    names = [family["name"] for family in families]
    points = [point for family in families for point in family["points"]]
    rows = [
        [f"{rate:g}", *(cells[rate].get(name, NOTHING) for name in names)]
        for rate in sorted(cells)
    ]
    return (
        "\n\n".join(
            [
                "# Best accuracy against the learning rate",
                f"{_data(comparison)} Best accuracy of any evaluation, top-1 in %"
                f"{_over_seeds(points)}; the rate is the initial one. The best rate of "
                "each column is bold. In brackets: the best accuracy of a network that "
                "diverged, stayed at chance "
                f"(about {comparison['chance']:.2f}%) or is not finished.",
                "![Best accuracy against the learning rate](rates.png)",
                table(["initial rate", *names], rows),
            ]
        )
        + "\n"
    )


def digits_to_show(comparison: Comparison) -> int:
    """Of accuracy: two, or as many more as show which models reach the levels."""
    for digits in range(2, MAX_DIGITS):
        if all(
            reference["level"] is None
            or (
                round(model["best"]["mean"], digits)
                >= round(reference["level"], digits)
            )
            == (reach["steps"] is not None)
            for model in comparison["models"]
            for reference, reach in zip(
                comparison["references"], model["reach"], strict=True
            )
        ):
            return digits
    return MAX_DIGITS


def level_in_words(reference: Comparison, digits: int) -> str:
    """The level to reach, or why there is none."""
    level = reference["level"]
    return "no level: at chance" if level is None else f"{level:.{digits}f}%"


def steps_in_words(reach: Mapping[str, Any]) -> str:
    """The steps to a level, or what happened instead."""
    return f"{reach['steps']:,}" if reach["outcome"] == "reached" else reach["outcome"]


def _in_the_end(model: Model) -> str:
    """Accuracy on all test examples, by Algorithm 2's statistics if there are any."""
    final = model["final"]["population"] or model["final"]["moving_average"]
    return spread(final["top1"]) if final else NOTHING


def _baselines_tried(tried: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the best baseline was chosen from; nothing if there was no choice."""
    if not tried:
        return []
    rows = [
        [each["name"], f"{each['initial_rate']:g}", spread(each["best"]), each["state"]]
        for each in tried
    ]
    return [
        "## Baselines that were tried",
        table(["model", "initial rate", "best accuracy, %", "state"], rows),
    ]


def _explanation(comparison: Comparison) -> list[str]:
    models, references = comparison["models"], comparison["references"]
    digits = digits_to_show(comparison)
    sentences = [_data(comparison)]
    for model, reference in zip(models, references, strict=False):
        sentences += _reference_in_words(model, reference, digits)
    if len(references) == 1 and references[0]["role"] == "the paper's rate":
        sentences.append(
            "Other rates of it were not tried: steps may be few beside its own at a "
            "rate that suits it less."
        )
    interval = comparison["evaluation_interval"]
    if interval:
        every = " to ".join(f"{steps:,}" for steps in sorted(set(interval)))
        sentences.append(
            f"Evaluations are {every} steps apart, and steps to the level are the "
            "first evaluation that reaches it: they are known no better than that."
        )
    sentences.append(
        "The ratio is the reference's steps by the model's. Accuracy is top-1 in %, of "
        f"one crop, by moving averages{_over_seeds(models)}; that in the end is of all "
        "test examples, by Algorithm 2's statistics where there are any."
    )
    if len(comparison["batch_sizes"]) > 1:
        sizes = ", ".join(f"{size:,}" for size in comparison["batch_sizes"])
        sentences.append(f"Batch sizes differ ({sizes}), so steps are not equal work.")
    sentences.append("The paper's numbers are those of ImageNet at 224 x 224.")
    return sentences


def _reference_in_words(model: Model, reference: Model, digits: int) -> list[str]:
    why = f" ({reference['role']})" if reference["role"] else ""
    name = f"A reference is {reference['name']}{why}"
    if reference["level"] is None:
        so_far = "stayed" if model["finished"] else "is not finished, and so far"
        return [f"{name}: it {so_far} at chance, so that there is nothing to reach."]
    level = level_in_words(reference, digits)
    sentences = [
        f"{name}: its best accuracy, {level}, at step {reference['step']:,}, is to be "
        "reached by the others."
    ]
    if not model["finished"]:
        sentences.append("Its run is not finished, so that the level may still rise.")
    elif reference["step"] == model["curve"]["steps"][-1]:
        sentences.append("It is the last evaluation: more steps might raise it.")
    return sentences


def _data(comparison: Comparison) -> str:
    test_set = comparison["test_set"]
    examples = test_set["eval_examples"]
    count = f"{examples:,} test examples" if examples else "all test examples"
    size = test_set["image_size"]
    return f"Data: {test_set['dataset']} at {size} x {size}, {count} while training."


def _over_seeds(models: Sequence[Model]) -> str:
    several = any(len(model["seeds"]) > 1 for model in models)
    words = ", mean ± sample standard deviation over seeds at steps they share"
    return words if several else ""


def _final_table(models: Sequence[Model]) -> str:
    rows = []
    for model in models:
        finals = [model["final"][kind] for kind in STATISTICS]
        cells = [
            f"{spread(final['top1'])} / {spread(final['top5'])}" if final else NOTHING
            for final in finals
        ]
        seeds = ", ".join(str(seed) for seed in model["seeds"])
        rows.append([model["name"], seeds, model["state"], *cells])
    return table(
        ["model", "seeds", "state", "moving average", "Algorithm 2", "test batch"], rows
    )


def _or_nothing(value: float | None, form: str) -> str:
    return NOTHING if value is None else f"{value:{form}}"
