"""Draws the results, and puts their tables into docs/performance.md.

    python -m benchmarks.report

The page's text stays; what stands between a marker <!-- name --> and the next
<!-- end --> is replaced.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks import compiled, libraries, pictures, results
from benchmarks.measuring import geometric_mean
from benchmarks.pictures import TRAINING, select, shape_of
from experiments.running.tables import table

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
# Not of `python -m benchmarks.all`: that needs no compilers of accelerators.
COMPILED = results.RESULTS / "compiled.json"
PICTURES = Path(__file__).parents[1] / "docs" / "results" / "performance"
JAX_PEERS = set(libraries.JAX_LAYERS) - {"bn_jax"}


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


def op_tables(content: dict[str, Any]) -> dict[str, str]:
    """Ratios over shapes, times by shape, and memory."""
    summary = [
        [
            row["name"],
            *(
                found[0]["time_over_ours"] if found else None
                for found in (
                    select(
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
        for row in select(
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
        rows = select(content["rows"], dtype=dtype, passes=TRAINING, relu=True)
        for shape in dict.fromkeys(map(shape_of, rows)):
            own = {row["name"]: row for row in rows if shape_of(row) == shape}
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
                for row in select(content["rows"], mode=mode)
            ],
        )
        for mode in ("training", "inference")
    }


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


def activations_tables(content: dict[str, Any]) -> dict[str, str]:
    """One row an activation and dtype."""
    rows = content["rows"]
    return {"activations": table(list(rows[0]), [list(row.values()) for row in rows])}


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
        rows = select(content["rows"], target=target)
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
    "op": (pictures.draw_op, op_tables),
    "activations": (pictures.draw_activations, activations_tables),
    "network": (pictures.draw_network, network_tables),
    "mnist": (pictures.draw_mnist, mnist_tables),
    "input": (pictures.draw_input, input_tables),
    "scaling": (pictures.draw_scaling, scaling_tables),
}

if __name__ == "__main__":
    main()
