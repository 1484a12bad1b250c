"""How much faster inference is with batch normalisation folded.

    python -m benchmarks.folding [--output=benchmarks/results]

The Inception network of section 4.2 on images of 64 x 64 and the MLP of section 4.1, as
trained and folded; each program's time is the least of several runs, taken in turn.
"""

import argparse
import functools
import json
import platform
import re
import time
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax

import bn_jax.linen
from bn_jax.linen_folding import apply_folded, check_folded, fold_batch_norms
from experiments.inception.network import Inception
from experiments.mnist.network import MLP
from experiments.running.tables import table

ROUNDS = 60
INCEPTION = Inception(
    num_classes=10,
    width=1 / 4,
    norm=functools.partial(bn_jax.linen.BatchNorm, epsilon=1e-3),
)
CASES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "MLP, batch 1,000": (MLP(), (1000, 784)),
    "Inception, width 1/4, batch 8": (INCEPTION, (8, 64, 64, 3)),
}


def measure(name: str, model: nn.Module, shape: tuple[int, ...]) -> dict[str, Any]:
    """Times and operations of one network, as trained and folded."""
    x = jax.random.normal(jax.random.key(0), shape)
    variables = jax.jit(functools.partial(model.init, train=False))(
        jax.random.key(1), x
    )
    folded, report = fold_batch_norms(model, variables, x, train=False)
    programs = {
        "trained": (functools.partial(model.apply, train=False), variables),
        "folded": (functools.partial(apply_folded, model, train=False), folded),
    }
    row: dict[str, Any] = {
        "network": name,
        "normalisations": len(report),
        "folded": sum(finding.reason is None for finding in report),
    }
    compiled = {}
    for kind, (function, own) in programs.items():
        compiled[kind] = jax.jit(function).lower(own, x).compile()
        jax.block_until_ready(compiled[kind](own, x))
        text = compiled[kind].as_text()
        row[f"rsqrt_{kind}"] = len(re.findall(r"= \S+ rsqrt\(", text))
        row[f"seconds_{kind}"] = float("inf")
    row["error"] = check_folded(model, variables, folded, x, train=False)
    for _ in range(ROUNDS):
        for kind, (_, own) in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(compiled[kind](own, x))
            seconds = time.perf_counter() - start
            row[f"seconds_{kind}"] = min(row[f"seconds_{kind}"], seconds)
    row["speed"] = row["seconds_trained"] / row["seconds_folded"]
    return row


def as_table(rows: list[dict[str, Any]]) -> str:
    """Rows as Markdown."""
    header = [
        *("network", "folded", "1/sqrt left", "ms as trained", "ms folded"),
        *("speed", "error"),
    ]
    cells = [
        [
            row["network"],
            f"{row['folded']} of {row['normalisations']}",
            f"{row['rsqrt_folded']} of {row['rsqrt_trained']}",
            f"{1e3 * row['seconds_trained']:.2f}",
            f"{1e3 * row['seconds_folded']:.2f}",
            f"{row['speed']:.2f}",
            f"{row['error']:.0e}",
        ]
        for row in rows
    ]
    return table(header, cells)


def main() -> None:
    """Measures, prints a table and writes the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    output = parser.parse_args().output
    rows = [measure(name, *case) for name, case in CASES.items()]
    print(as_table(rows))
    output.mkdir(parents=True, exist_ok=True)
    result = {
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "machine": platform.machine(),
        "rounds": ROUNDS,
        "rows": rows,
    }
    (output / "folding.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
