"""Draws the results, and puts their tables into docs/performance.md.

    python -m benchmarks.report

The page's text stays; what stands between a marker <!-- name --> and the next
<!-- end --> is replaced.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks import compiled, peers, results
from benchmarks.measuring import geometric_mean
from experiments.running.tables import table

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
# Not of `python -m benchmarks.all`: that needs no compilers of accelerators.
COMPILED = results.RESULTS / "compiled.json"
PICTURES = Path(__file__).parents[1] / "docs" / "results" / "performance"
TRAINING = "forward and backward"
JAX_PEERS = set(peers.JAX_LAYERS) - {"bn_jax"}
COLOURS = {
    "bn_jax": "tab:blue",
    "bn_jax, rematerialised": "tab:cyan",
    "flax.linen": "tab:red",
    "flax.linen, two passes": "tab:orange",
    "flax.nnx": "tab:pink",
    "haiku": "tab:green",
    "equinox": "tab:olive",
    "keras on jax": "tab:purple",
    "torch": "tab:brown",
    "no normalisation": "tab:gray",
}


def main() -> None:
    """Draws and writes whatever there are results of."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    text = PAGE.read_text()
    for name, (draw, make_tables) in PARTS.items():
        path = results.RESULTS / f"{name}.json"
        if not path.exists():
            print(f"skipped, no {path}")
            continue
        content = results.read(path)
        draw(content).savefig(PICTURES / f"{name}.png", dpi=120)
        for marker, block in make_tables(content).items():
            text = replace_block(text, marker, block)
        text = replace_block(text, f"{name}-machine", describe(content["machine"]))
    for marker, block in compiled_tables(results.read(COMPILED)).items():
        text = replace_block(text, marker, block)
    PAGE.write_text(text)


def replace_block(text: str, marker: str, block: str) -> str:
    """Puts a block between <!-- marker --> and the next <!-- end -->.

    Raises:
      ValueError: the text has no such place.
    """
    pattern = rf"(<!-- {re.escape(marker)} -->\n).*?(<!-- end -->)"
    new, count = re.subn(
        pattern, lambda match: f"{match[1]}{block}\n{match[2]}", text, flags=re.DOTALL
    )
    if count != 1:
        raise ValueError(f"expected <!-- {marker} --> once in the page, found {count}")
    return new


def describe(machine: dict[str, Any]) -> str:
    """A sentence on where and when."""
    packages = machine["packages"]
    versions = ", ".join(
        f"{package} {packages[package]}"
        for package in ("jax", "flax", "torch")
        if package in packages
    )
    load = machine["load_before"][0]
    return (
        f"{machine['date']}, {machine['cores']} core(s) of {machine['processor']}, "
        f"{versions}; load of the machine before: {load:g}."
    )


def _select(rows: Sequence[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    return [row for row in rows if all(row[key] == wanted[key] for key in wanted)]


def _shape(row: dict[str, Any]) -> str:
    return "x".join(map(str, row["shape"]))


def draw_op(content: dict[str, Any]) -> Figure:
    """Share of the limit by shape, a panel a dtype."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, dtype in zip(panels, ("float32", "bfloat16"), strict=True):
        rows = _select(content["rows"], dtype=dtype, passes=TRAINING, relu=True)
        rows = [row for row in rows if row["name"] != "copy" and len(row["shape"]) == 4]
        shapes = list(dict.fromkeys(map(_shape, rows)))
        names = list(dict.fromkeys(row["name"] for row in rows))
        width = 0.8 / len(names)
        for number, name in enumerate(names):
            own = {
                _shape(row): row["share_of_limit"]
                for row in rows
                if row["name"] == name
            }
            panel.bar(
                np.arange(len(shapes)) + (number - len(names) / 2 + 0.5) * width,
                [100 * own[shape] for shape in shapes],
                width,
                label=name,
                color=COLOURS[name],
            )
        panel.set_xticks(range(len(shapes)), shapes, rotation=30, ha="right")
        panel.set_title(f"BN and ReLU, forward and backward, {dtype}")
        panel.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel(
        "% of the speed of copying 8 times the input\n(more is faster)"
    )
    panels[1].legend(fontsize="small", ncols=2)
    return figure


def op_tables(content: dict[str, Any]) -> dict[str, str]:
    """Ratios over shapes, times by shape, and memory."""
    summary = [
        [
            row["name"],
            *(
                found[0]["time_over_ours"] if found else None
                for found in (
                    _select(
                        content["summary"],
                        name=row["name"],
                        dtype=dtype,
                        passes=passes,
                        relu=relu,
                    )
                    for dtype in ("float32", "bfloat16")
                    for relu, passes in (
                        (True, TRAINING),
                        (False, TRAINING),
                        (True, "forward"),
                    )
                )
            ),
        ]
        for row in _select(
            content["summary"], dtype="float32", passes=TRAINING, relu=True
        )
    ]
    kinds = ("BN+ReLU, both passes", "BN, both passes", "BN+ReLU, forward")
    head = [
        "time / ours",
        *(f"{d}: {k}" for d in ("float32", "bfloat16") for k in kinds),
    ]
    times, memory = [], []
    for dtype in ("float32", "bfloat16"):
        rows = _select(content["rows"], dtype=dtype, passes=TRAINING, relu=True)
        for shape in dict.fromkeys(map(_shape, rows)):
            own = {row["name"]: row for row in rows if _shape(row) == shape}
            jax_peers = [row["ratio"] for name, row in own.items() if name in JAX_PEERS]
            times.append(
                [
                    shape,
                    dtype,
                    4 * own["copy"]["median"],
                    own["bn_jax"]["median"],
                    f"{own['bn_jax']['low']:.3g} to {own['bn_jax']['high']:.3g}",
                    own["flax.linen"]["median"],
                    own["flax.linen"]["ratio"],
                    min(jax_peers),
                    own["torch"]["ratio"] if "torch" in own else None,
                ]
            )
        large = [row for row in rows if len(row["shape"]) == 4 and "kept" in row]
        for name in dict.fromkeys(row["name"] for row in large):
            chosen = [row for row in large if row["name"] == name]
            memory.append(
                [
                    name,
                    dtype,
                    *(
                        geometric_mean(row[key] for row in chosen)
                        for key in ("kept", "temporary")
                    ),
                    f"{min(r['written'] for r in chosen)} to "
                    f"{max(r['written'] for r in chosen)}",
                ]
            )
    time_head = [
        *("shape", "dtype", "limit, ms", "ours, ms", "quartiles", "flax, ms"),
        *("flax / ours", "fastest JAX peer / ours", "torch / ours"),
    ]
    memory_head = ["", "dtype", "kept", "temporary", "large arrays written"]
    return {
        "op-summary": table(head, summary),
        "op-times": table(time_head, times),
        "op-memory": table(memory_head, memory),
    }


def draw_network(content: dict[str, Any]) -> Figure:
    """Time of a training step, and its memory, a panel a network."""
    rows = _select(content["rows"], mode="training")
    groups = list(dict.fromkeys((row["network"], row["dtype"]) for row in rows))
    figure = Figure(figsize=(4.5 * len(groups), 3.6), layout="constrained")
    panels = figure.subplots(1, len(groups), squeeze=False)[0]
    for panel, (network, dtype) in zip(panels, groups, strict=True):
        own = _select(rows, network=network, dtype=dtype)
        names = [row["name"] for row in own]
        times = np.array([row["median"] for row in own])
        spread = [
            times - [row["low"] for row in own],
            [row["high"] for row in own] - times,
        ]
        panel.barh(names, times, xerr=spread, color=[COLOURS[name] for name in names])
        for place, row in enumerate(own):
            panel.text(0, place, f"  {row['temporary_megabytes']:.0f} MB", va="center")
        panel.invert_yaxis()
        panel.set_title(f"{network}, {dtype}")
        panel.set_xlabel("ms a training step; in the bar, memory")
    return figure


def network_tables(content: dict[str, Any]) -> dict[str, str]:
    """Training and inference of every network."""
    keys = {
        "network": "network",
        "images": "image_size",
        "width": "width",
        "batch": "batch",
        "dtype": "dtype",
        "": "name",
        "ms": "median",
        "images/s": "images_per_second",
        "BN costs, ms": "bn_costs",
        "memory, MB": "temporary_megabytes",
    }
    return {
        f"network-{mode}": table(
            list(keys),
            [
                [row[key] for key in keys.values()]
                for row in _select(content["rows"], mode=mode)
            ],
        )
        for mode in ("training", "inference")
    }


def draw_mnist(content: dict[str, Any]) -> Figure:
    """Seconds for the whole training."""
    return _bars(content["rows"], "seconds_50000_steps", "s for 50,000 steps")


def mnist_tables(content: dict[str, Any]) -> dict[str, str]:
    """One row a contestant."""
    keys = {
        "": "name",
        "µs a step": "microseconds_a_step",
        "50,000 steps, s": "seconds_50000_steps",
        "time / ours": "ratio",
    }
    body = [[row[key] for key in keys.values()] for row in content["rows"]]
    return {"mnist": table(list(keys), body)}


def draw_activations(content: dict[str, Any]) -> Figure:
    """How much longer an activation takes after the transform than in it."""
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    panel = figure.subplots()
    names = list(dict.fromkeys(row["activation"] for row in content["rows"]))
    dtypes = list(dict.fromkeys(row["dtype"] for row in content["rows"]))
    for number, dtype in enumerate(dtypes):
        own = _select(content["rows"], dtype=dtype)
        places = np.arange(len(names)) + 0.4 * number - 0.2
        panel.bar(places, [row["apart / fused"] for row in own], 0.38, label=dtype)
    panel.axhline(1, color="black", linewidth=0.8)
    panel.set_xticks(range(len(names)), names)
    panel.set_ylabel("time apart / fused")
    panel.legend()
    return figure


def activations_tables(content: dict[str, Any]) -> dict[str, str]:
    """One row an activation and dtype."""
    rows = content["rows"]
    return {"activations": table(list(rows[0]), [list(row.values()) for row in rows])}


def draw_input(content: dict[str, Any]) -> Figure:
    """Images a second against workers."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    panel = figure.subplots()
    for name in dict.fromkeys(row["name"] for row in content["rows"]):
        own = _select(content["rows"], name=name)
        workers = [row["workers"] for row in own]
        panel.plot(workers, [row["images_per_second"] for row in own], "o-", label=name)
    panel.set_xticks(sorted({row["workers"] for row in content["rows"]}))
    panel.set_xlabel("worker processes (tf.data: threads)")
    panel.set_ylabel("images a second")
    panel.set_ylim(bottom=0)
    panel.grid(alpha=0.3)
    panel.legend()
    return figure


def input_tables(content: dict[str, Any]) -> dict[str, str]:
    """One row a contestant, and the waiting share."""
    keys = {
        "": "name",
        "workers": "workers",
        "images/s": "images_per_second",
        "of the decoder alone": "share_of_decoder",
    }
    body = [[row[key] for key in keys.values()] for row in content["rows"]]
    waiting = (
        f"JPEGs of {content['kilobytes_an_image']:.0f} KB ({content['images']}). A "
        "training step of the small Inception waits for its images "
        f"{100 * content['waiting_share']:.1f}% of its time."
    )
    return {"input": f"{table(list(keys), body)}\n\n{waiting}"}


def _bars(rows: Sequence[dict[str, Any]], key: str, label: str) -> Figure:
    figure = Figure(figsize=(6, 0.7 + 0.5 * len(rows)), layout="constrained")
    panel = figure.subplots()
    values = [row[key] for row in rows]
    colours = ["tab:blue", *["tab:gray"] * (len(rows) - 1)]
    panel.barh([row["name"] for row in rows], values, color=colours)
    panel.invert_yaxis()
    panel.set_xlabel(label)
    return figure


def draw_scaling(content: dict[str, Any]) -> Figure:
    """Against batch, channels, devices and width."""
    figure = Figure(figsize=(14, 3.4), layout="constrained")
    panels = figure.subplots(1, 4)
    kinds: list[tuple[str, str, str, float]] = [
        ("batch", "median", "ms, (batch, 14, 14, 256)", 1),
        ("channels", "median", "ms, (32, 14, 14, channels)", 1),
        ("devices", "bytes", "KB of collectives a step, 256 channels", 1e-3),
    ]
    for panel, (varied, key, label, unit) in zip(panels, kinds, strict=False):
        for name in ("bn_jax", "flax.linen"):
            rows = _select(content[varied], name=name)
            panel.plot(
                [row[varied] for row in rows],
                [unit * row[key] for row in rows],
                "o-",
                label=name,
                color=COLOURS[name],
            )
        panel.set_xlabel(varied)
        panel.set_ylabel(label)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        panel.grid(alpha=0.3)
    panels[0].legend()
    rows = content["checkpoint"]
    for key in ("state_megabytes", "checkpoint_megabytes"):
        label = key.removesuffix("_megabytes")
        panels[3].plot(
            [row["width"] for row in rows],
            [row[key] for row in rows],
            "o-",
            label=label,
        )
    panels[3].set_xlabel("width of Inception")
    panels[3].set_ylabel("MB")
    panels[3].grid(alpha=0.3)
    panels[3].legend()
    return figure


def scaling_tables(content: dict[str, Any]) -> dict[str, str]:
    """Collectives and checkpoints."""
    blocks = {}
    for name in ("devices", "checkpoint"):
        rows = content[name]
        head = [key.replace("_", " ") for key in rows[0]]
        blocks[f"scaling-{name}"] = table(head, [list(row.values()) for row in rows])
    return blocks


def compiled_tables(content: dict[str, Any]) -> dict[str, str]:
    """What was compiled for each target."""
    keys = {"network": "network", "batch": "batch", **compiled.COLUMNS}
    blocks = {}
    for target in dict.fromkeys(row["target"] for row in content["rows"]):
        rows = _select(content["rows"], target=target)
        shown = {
            head: key
            for head, key in keys.items()
            if any(row[key] is not None for row in rows)
        }
        body = [[row[key] for key in shown.values()] for row in rows]
        blocks[f"compiled-{target}"] = table(list(shown), body)
    return blocks


PARTS: dict[
    str,
    tuple[
        Callable[[dict[str, Any]], Figure], Callable[[dict[str, Any]], dict[str, str]]
    ],
] = {
    "op": (draw_op, op_tables),
    "activations": (draw_activations, activations_tables),
    "network": (draw_network, network_tables),
    "mnist": (draw_mnist, mnist_tables),
    "input": (draw_input, input_tables),
    "scaling": (draw_scaling, scaling_tables),
}

if __name__ == "__main__":
    main()
