"""What the batch size experiment showed: its numbers, its table and its figure."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.running import provenance
from experiments.running.figures import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION
from experiments.running.tables import NOTHING, spread, table

LABELS = {
    "batch_norm": "batch normalisation",
    "ghost": "ghost batches",
    "renorm": "batch renormalisation",
    "layer_norm": "layer normalisation",
    "group_norm": "group normalisation",
    "instance_norm": "instance normalisation",
}
STYLES = {
    "batch_norm": {"color": BLUE, "marker": "o"},
    "ghost": {"color": SKY, "marker": "s", "linestyle": "--"},
    "renorm": {"color": GREEN, "marker": "D"},
    "layer_norm": {"color": VERMILION, "marker": "v", "linestyle": "-."},
    "group_norm": {"color": ORANGE, "marker": "^", "linestyle": "--"},
    "instance_norm": {"color": PURPLE, "marker": "x", "linestyle": ":"},
}
ACCURACY_TICKS = (0, 20, 40, 60, 70, 80, 85, 90, 92, 94, 95, 96, 97, 98, 99)


def summarise(
    config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Chooses each setting's rate on validation images, and takes its test accuracy.

    Args:
      config: of the run.
      rows: of results.jsonl.

    Returns:
      JSON values; `results` holds one entry a setting.
    """
    return {
        **provenance.describe(),
        "config": dict(config),
        "seconds": round(sum(row["seconds"] for row in rows), 1),
        "results": [_result(row) for row in rows],
    }


def _result(row: Mapping[str, Any]) -> dict[str, Any]:
    validation = np.asarray(row["validation"]).mean(1)
    best = int(validation.argmax())
    test = row["test"][best]
    return {
        **{key: row[key] for key in ("method", "order", "batch_size")},
        "learning_rate": row["learning_rates"][best],
        # At an end of the grid a better rate may lie beyond it.
        "rate_at_end_of_grid": best in (0, len(validation) - 1),
        "test": {
            "mean": float(np.mean(test)),
            "std": float(np.std(test, ddof=1)) if len(test) > 1 else None,
            "values": test,
        },
    }


def page(summary: Mapping[str, Any]) -> str:
    """A table for each order, as Markdown."""
    config = summary["config"]
    parts = ["# Accuracy against batch size", "![Accuracy](batch_size.png)"]
    for order in dict.fromkeys(entry["order"] for entry in summary["results"]):
        own = [entry for entry in summary["results"] if entry["order"] == order]
        sizes = sorted({entry["batch_size"] for entry in own})
        cells = {(e["method"], e["batch_size"]): spread(e["test"], 1) for e in own}
        parts += [
            f"## {_title(order, config)}",
            "Test accuracy in %, mean ± standard deviation over seeds "
            f"({config['num_seeds']}).",
            table(
                ["batch size", *map(str, sizes)],
                [
                    [
                        LABELS.get(method, method),
                        *(cells.get((method, size), NOTHING) for size in sizes),
                    ]
                    for method in _methods(own)
                ],
            ),
        ]
    return "\n\n".join(parts) + "\n"


def draw(summary: Mapping[str, Any]) -> Figure:
    """Test accuracy over batch size, a panel an order."""
    results = summary["results"]
    orders = list(dict.fromkeys(entry["order"] for entry in results))
    figure = Figure(figsize=(5.5 * len(orders), 4.2), layout="constrained")
    panels = figure.subplots(1, len(orders), squeeze=False, sharey=True)[0]
    for panel, order in zip(panels, orders, strict=True):
        for method in _methods(results):
            own = sorted(
                (entry["batch_size"], entry["test"]["mean"], entry["test"]["std"] or 0)
                for entry in results
                if (entry["method"], entry["order"]) == (method, order)
            )
            if not own:
                continue
            sizes, means, stds = zip(*own, strict=True)
            panel.errorbar(
                *(sizes, means, stds),
                label=LABELS.get(method, method),
                capsize=2,
                **STYLES.get(method, {"marker": "."}),
            )
        ticks = sorted({entry["batch_size"] for entry in results})
        panel.set_xscale("log", base=2)
        panel.set_xticks(ticks, [str(size) for size in ticks])
        panel.set_xlabel("batch size")
        # By the logarithm of the error: 96% is as far from 92% as 92% from 84%.
        panel.set_yscale("function", functions=(_from_accuracy, _to_accuracy))
        best = max(entry["test"]["mean"] for entry in results)
        top = max(98, (100 + best) / 2)
        shown = [tick for tick in ACCURACY_TICKS if tick <= top]
        panel.set_yticks(shown, [str(tick) for tick in shown])
        panel.set_ylim(0, top)
        panel.set_title(_title(order, summary["config"]))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel(
        f"test accuracy after {summary['config']['num_examples']:,} examples, %"
    )
    panels[-1].legend(fontsize="small", loc="lower left", handlelength=3.5)
    return figure


def _methods(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """The methods that there are: those with labels first, in their order."""
    present = dict.fromkeys(entry["method"] for entry in entries)
    return sorted(present, key=[*LABELS, *present].index)


def _from_accuracy(accuracy: np.ndarray) -> np.ndarray:
    return -np.log(np.maximum(100 - accuracy, 0.1))


def _to_accuracy(height: np.ndarray) -> np.ndarray:
    return 100 - np.exp(-height)


def _title(order: str, config: Mapping[str, Any]) -> str:
    if order == "skewed":
        return f"Batches of {config['skewed_classes']} classes each"
    return "Shuffled batches"
