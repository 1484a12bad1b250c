"""What exact moments over micro-batches cost in memory and time, each way.

    python -m benchmarks.micro_batches [--output=benchmarks/results]

A dense network of tanh layers with one batch normalisation each, one training step.
"Kept" is what automatic differentiation keeps from the forward for the backward pass;
"memory" what the compiled program allocates beside its arguments and results; time is
the least of several runs, the ways taken in turn.
"""

import argparse
import functools
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import bn_jax
from experiments.running.tables import NOTHING, table

WIDTH, BATCH_SIZE, MICRO_BATCHES = 256, 4096, 16
DEPTHS = (1, 3, 6)
ROUNDS = 15
LARGE = "one large batch"
KEEP_PRODUCTS = jax.checkpoint_policies.save_only_these_names(
    "product", bn_jax.MOMENTS_NAME
)

Step = Callable[[Any], Any]


def network_loss(
    params: Any, stats: Any, batch: Any, axis_name: str | None = None
) -> tuple[jax.Array, Any]:
    """A mean square error over the large batch, and new statistics."""
    x, target = batch
    new_stats = []
    for layer, old in zip(params, stats, strict=True):
        x = jax.ad_checkpoint.checkpoint_name(x @ layer["kernel"], "product")
        x, new = bn_jax.batch_norm(
            layer["norm"], old, x, train=True, axis_name=axis_name
        )
        # Without a kink, or rounding alone would now and then change a gradient.
        x = jnp.tanh(x)
        new_stats.append(new)
    return jnp.sum((x - target) ** 2) / BATCH_SIZE, new_stats


def differentiated(stats: Any, parts: Any) -> dict[str, Step]:
    """Ways that differentiate a loss of the whole batch, by that loss."""
    batch = jax.tree.map(lambda a: a.reshape(-1, WIDTH), parts)

    def large(params: Any) -> Any:
        return network_loss(params, stats, batch)

    def mapped(params: Any) -> Any:
        name = "micro_batches"
        one = functools.partial(network_loss, params, stats, axis_name=name)
        losses, new_stats = jax.vmap(one, axis_name=name)(parts)
        return losses.sum(), jax.tree.map(lambda leaf: leaf[0], new_stats)

    return {
        LARGE: large,
        "the same, keeping only layers' products": jax.checkpoint(
            large, policy=KEEP_PRODUCTS
        ),
        "vmap over micro-batches with axis_name": mapped,
    }


def accumulating(stats: Any, parts: Any) -> dict[str, Step]:
    """Ways that add up gradients of micro-batches, by a function that gives these."""

    def accumulated(params: Any) -> Any:
        (_, new_stats), grads = bn_jax.accumulate_gradients(
            network_loss, params, stats, parts
        )
        return grads, new_stats

    def separate(params: Any) -> Any:
        def add(carry: Any, part: Any) -> Any:
            total, stats = carry
            grads, stats = jax.grad(network_loss, has_aux=True)(params, stats, part)
            return (jax.tree.map(jnp.add, total, grads), stats), None

        nothing = jax.tree.map(jnp.zeros_like, params)
        return jax.lax.scan(add, (nothing, stats), parts)[0]

    return {
        "accumulate_gradients": accumulated,
        "separate micro-batches (other moments)": separate,
    }


def kept_bytes(loss: Step, params: Any) -> int:
    """What `jax.grad` of a loss keeps from its forward pass, beside the parameters."""

    def residuals(params: Any) -> Any:
        return jax.vjp(loss, params, has_aux=True)[1]

    kept = jax.tree.leaves(jax.eval_shape(residuals, params))
    own = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in kept) - own


def measure(depth: int) -> list[dict[str, Any]]:
    """Memory, time and agreement of each way, for a network of some depth."""
    keys = jax.random.split(jax.random.key(0), depth + 2)
    params = [
        {
            "kernel": jax.random.normal(key, (WIDTH, WIDTH)) / WIDTH**0.5,
            "norm": bn_jax.init_params(WIDTH),
        }
        for key in keys[2:]
    ]
    stats = [bn_jax.init_stats(WIDTH)] * depth
    batch = tuple(jax.random.normal(key, (BATCH_SIZE, WIDTH)) for key in keys[:2])
    # Parts that differ in mean and spread, as a real stream's do a little.
    drift = jnp.linspace(0.5, 1.5, BATCH_SIZE)[:, None]
    batch = (batch[0] * drift + drift, batch[1])
    parts = jax.tree.map(lambda a: a.reshape(MICRO_BATCHES, -1, WIDTH), batch)
    losses = differentiated(stats, parts)
    ways = {name: jax.grad(loss, has_aux=True) for name, loss in losses.items()}
    ways |= accumulating(stats, parts)
    compiled = {
        name: jax.jit(way).lower(params).compile() for name, way in ways.items()
    }
    expected = jax.tree.leaves(compiled[LARGE](params)[0])
    least = dict.fromkeys(compiled, float("inf"))
    for _ in range(ROUNDS):
        for name, program in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(program(params))
            least[name] = min(least[name], time.perf_counter() - start)
    rows = []
    for name, program in compiled.items():
        got = jax.tree.leaves(program(params)[0])
        pairs = list(zip(got, expected, strict=True))
        size = max(float(jnp.abs(want).max()) for _, want in pairs)
        error = max(float(jnp.abs(a - b).max()) for a, b in pairs)
        rows.append(
            {
                "layers": depth,
                "way": name,
                "kept": kept_bytes(losses[name], params) if name in losses else None,
                "memory": program.memory_analysis().temp_size_in_bytes,
                "seconds": least[name],
                "error": error / size,
            }
        )
    return rows


def as_table(rows: list[dict[str, Any]]) -> str:
    """Rows as Markdown, with times relative to those of the large batch."""
    header = [
        *("layers", "way", "kept, MB", "memory, MB"),
        *("time", "gradients differ by"),
    ]
    cells = []
    for row in rows:
        large = next(r for r in rows if r["layers"] == row["layers"])
        cells.append(
            [
                str(row["layers"]),
                row["way"],
                NOTHING if row["kept"] is None else f"{row['kept'] / 1e6:.1f}",
                f"{row['memory'] / 1e6:.1f}",
                f"{row['seconds'] / large['seconds']:.2f}",
                f"{row['error']:.0e}",
            ]
        )
    return table(header, cells)


def main() -> None:
    """Measures, prints a table and writes it with the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    output = parser.parse_args().output
    rows = [row for depth in DEPTHS for row in measure(depth)]
    print(as_table(rows))
    output.mkdir(parents=True, exist_ok=True)
    result = {
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "machine": platform.machine(),
        "width": WIDTH,
        "batch_size": BATCH_SIZE,
        "micro_batches": MICRO_BATCHES,
        "rounds": ROUNDS,
        "rows": rows,
    }
    (output / "micro_batches.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
