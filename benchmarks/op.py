"""Batch normalisation alone: training forward, and forward with backward, beside peers.

Every contestant gets the same random inputs, several sets in rotation that together do
not fit in the cache, and is timed in turns with the others. The limit is what copying
would take for the fewest passes: 3 forward, 8 with the backward pass (2 for a copy).
`temporary` is the compiled program's memory beside arguments and results, `kept` what
reverse mode keeps, both in units of the input. The peers of the extra `benchmarks` that
are not installed are skipped by name.
"""

import argparse
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import measuring, results

CONVOLUTIONS = {
    # BN-Inception and ResNet-50 have these in common, or differ only in channels.
    "small": [
        (32, 112, 112, 64),
        (32, 56, 56, 64),
        (32, 56, 56, 192),
        (32, 28, 28, 320),
        (32, 14, 14, 576),
        (32, 7, 7, 1024),
    ],
    "large": [
        (256, 112, 112, 64),
        (256, 56, 56, 256),
        (256, 28, 28, 512),
        (256, 14, 14, 1024),
        (256, 7, 7, 2048),
    ],
}
DENSE = [(60, 100), (8192, 4096)]
TINY = [(4, 6, 6, 8), (8, 4)]
DTYPES = ("float32", "bfloat16")
PASSES = {"forward": 3, "forward and backward": 8}
# With ReLU or without, and the passes.
KINDS = (
    (True, "forward and backward"),
    (True, "forward"),
    (False, "forward and backward"),
)
CACHE_BYTES = 64 << 20  # inputs of one contestant are at least as large together
ROUNDS = 9


def main(arguments: argparse.Namespace) -> None:
    """Measures, prints tables and writes the results."""
    settings = [
        (*setting, relu, passes)
        for setting in itertools.product(_shapes(arguments), DTYPES)
        for relu, passes in KINDS
    ]
    from benchmarks import peers

    _, missing = peers.installed()
    if missing:
        print(f"skipped, not installed: {', '.join(missing)}")
    machine = results.machine()
    rounds = arguments.rounds or (2 if arguments.tiny else ROUNDS)
    rows = []
    for shape, dtype, relu, passes in settings:
        measured = measure(shape, dtype, relu, passes, rounds)
        _print(measured)
        rows += measured
    summary = summarise(rows)
    print(results.table(list(summary[0]), [list(row.values()) for row in summary]))
    results.write(
        arguments.output, {"machine": machine, "summary": summary, "rows": rows}
    )


def _shapes(arguments: argparse.Namespace) -> Sequence[tuple[int, ...]]:
    if arguments.tiny:
        return TINY
    large = CONVOLUTIONS["large"] if arguments.large else []
    return [*CONVOLUTIONS["small"], *DENSE, *large]


def measure(
    shape: tuple[int, ...],
    dtype: str,
    relu: bool,
    passes: str,
    rounds: int,
    only: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Times contestants on one kind of input.

    Args:
      shape: of the input, features last.
      dtype: of the input.
      relu: normalise and apply ReLU.
      passes: a key of `PASSES`.
      rounds: timed calls of each.
      only: names of contestants; None for all that are installed.

    Returns:
      A row a contestant; the first is ours, the last a copy of the input.
    """
    import jax
    import jax.numpy as jnp

    from benchmarks import peers, programs

    size = math.prod(shape)
    input_bytes = size * jnp.dtype(dtype).itemsize
    num_sets = min(8, 1 + CACHE_BYTES // (2 * input_bytes))
    sets = _random(shape, num_sets)
    backward = passes != "forward"
    calls: dict[str, Callable[[int], Any]] = {}
    facts: dict[str, dict[str, float]] = {}
    layers, missing = peers.installed()
    names = [*layers, *({"torch"} - set(missing))] if only is None else only
    inputs = [[jnp.asarray(a, dtype) for a in pair] for pair in sets]
    for name in (name for name in layers if name in names):
        layer = layers[name](shape, jnp.dtype(dtype), relu)
        own = inputs
        if layer.channels_first:
            own = [[jnp.moveaxis(a, -1, 1) for a in pair] for pair in inputs]
        step = functools.partial(_step, layer, backward)
        compiled = jax.jit(step).lower(layer.params, *own[0]).compile()
        calls[name] = functools.partial(_call, compiled, layer.params, own)
        kept = programs.residual_bytes(layer.forward, layer.params, own[0][0])
        facts[name] = {
            "temporary": programs.temporary_bytes(compiled) / input_bytes,
            "kept": kept / input_bytes,
            "written": programs.large_results(compiled.as_text() or "", size // 2),
        }
    if "torch" in names:
        steps = [
            peers.torch_step(x, dy, dtype == "bfloat16", relu, backward)
            for x, dy in sets
        ]
        calls["torch"] = lambda turn: steps[turn % num_sets]()
    copy = jax.jit(lambda params, x, dy: x + 1).lower(None, *inputs[0]).compile()
    calls["copy"] = functools.partial(_call, copy, None, inputs)
    timings = measuring.time_in_turns(calls, rounds)
    limit = PASSES[passes] / 2 * timings["copy"].median
    return [
        {
            "shape": list(shape),
            "dtype": dtype,
            "relu": relu,
            "passes": passes,
            "name": name,
            **timing._asdict(),
            "share_of_limit": limit / timing.median,
            **facts.get(name, {}),
        }
        for name, timing in timings.items()
    ]


@functools.lru_cache(maxsize=1)
def _random(shape: tuple[int, ...], num_sets: int) -> list[list[Any]]:
    import numpy as np

    rng = np.random.default_rng(0)
    return [
        [rng.standard_normal(shape, np.float32) + 0.5 for _ in range(2)]
        for _ in range(num_sets)
    ]


def _step(layer: Any, backward: bool, params: Any, x: Any, dy: Any) -> Any:
    import jax

    if not backward:
        return layer.forward(params, x)
    y, pullback, stats = jax.vjp(layer.forward, params, x, has_aux=True)
    return y, pullback(dy.astype(y.dtype)), stats


def _call(compiled: Any, params: Any, inputs: Any, turn: int) -> None:
    import jax

    jax.block_until_ready(compiled(params, *inputs[turn % len(inputs)]))


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each contestant's time divided by ours, over the convolutional shapes.

    Returns:
      A row a dtype, kind of pass and contestant: the geometric mean over shapes of the
      ratio, and the smallest.
    """
    summary = []
    keys = ("dtype", "passes", "relu", "name")
    groups: dict[Any, list[float]] = {}
    for row in rows:
        if len(row["shape"]) == 4 and row["name"] not in ("bn_jax", "copy"):
            groups.setdefault(tuple(row[key] for key in keys), []).append(row["ratio"])
    for group, ratios in groups.items():
        summary.append(
            {
                **dict(zip(keys, group, strict=True)),
                "time_over_ours": measuring.geometric_mean(ratios),
                "smallest": min(ratios),
            }
        )
    return summary


def _print(rows: Sequence[dict[str, Any]]) -> None:
    first = rows[0]
    sizes = "x".join(map(str, first["shape"]))
    activation = " with ReLU" if first["relu"] else ""
    print(f"\n{sizes} {first['dtype']}, {first['passes']}{activation}")
    columns = {
        "": "name",
        "ms": "median",
        "25%": "low",
        "75%": "high",
        "time/ours": "ratio",
        "limit/time": "share_of_limit",
        "temporary": "temporary",
        "kept": "kept",
        "written": "written",
    }
    body = [[row.get(key) for key in columns.values()] for row in rows]
    print(results.table(list(columns), body), flush=True)


def flags() -> argparse.Namespace:
    """This benchmark's command line."""
    return results.parse(
        __doc__,
        "op",
        large="anything: batch 256, too, which wants a GPU or 16 GB and an hour",
    )


if __name__ == "__main__":
    given = flags()
    measuring.prepare(given.cores)
    main(given)
