"""Batch normalisation alone: training forward, backward, and both, beside peers.

Every contestant gets the same random inputs, several sets in rotation that together do
not fit in the cache, and is timed in turns with the others. The limit is what copying
would take for the fewest passes: 3 forward, 5 backward, 8 for both (2 for a copy).
`temporary` is the compiled program's memory beside arguments and results, `kept` what
reverse mode keeps, both in units of the input. The peers of the extra `benchmarks` that
are not installed are skipped by name. Small inputs are also normalised without jit. On
a GPU the activations are 100 MB and larger.
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
    ],
}
DENSE = [(60, 100), (8192, 4096)]
TINY = [(4, 6, 6, 8), (8, 4)]
DTYPES = ("float32", "bfloat16")
EAGER = "forward without jit"
PASSES = {"forward": 3, "backward": 5, "forward and backward": 8, EAGER: 3}
# With ReLU or without, and the passes.
KINDS = (
    (True, "forward and backward"),
    (True, "forward"),
    (True, "backward"),
    (False, "forward and backward"),
    (True, EAGER),
)
MAX_EAGER_SIZE = 10_000  # where what is measured is the call
CACHE_BYTES = 64 << 20  # inputs of one contestant are at least as large together
ROUNDS = 9
NOT_COMPARED = ("bn_jax", "copy", "copy by torch")
# On an accelerator so many calls are waited for together: sending one off takes as long
# as a small one's work.
REPEATS = {"cpu": 1, "gpu": 10}


def main(arguments: argparse.Namespace) -> None:
    """Measures, prints tables and writes the results."""
    from benchmarks import libraries, torch_layer

    layers, missing = libraries.installed()
    only = results.chosen("only", arguments.only, [*layers, *torch_layer.VARIANTS])
    dtypes = results.chosen("dtypes", arguments.dtypes, DTYPES)
    chosen_passes = results.chosen("passes", arguments.passes, list(PASSES))
    settings = [
        (*setting, relu, passes)
        for setting in itertools.product(_shapes(arguments), dtypes)
        for relu, passes in KINDS
        if passes in chosen_passes
        and (passes != EAGER or math.prod(setting[0]) <= MAX_EAGER_SIZE)
    ]
    if missing:
        print(f"skipped, not installed: {', '.join(missing)}")
    machine = results.machine()
    rounds = arguments.rounds or (2 if arguments.tiny else ROUNDS)
    rows = []
    for shape, dtype, relu, passes in settings:
        measured = measure(shape, dtype, relu, passes, rounds, only)
        _print(measured)
        rows += measured
    summary = summarise(rows)
    print(results.table(list(summary[0]), [list(row.values()) for row in summary]))
    results.write(
        arguments.output, {"machine": machine, "summary": summary, "rows": rows}
    )


def _shapes(arguments: argparse.Namespace) -> Sequence[tuple[int, ...]]:
    import jax

    if arguments.tiny:
        return TINY
    if jax.default_backend() != "cpu":
        return CONVOLUTIONS["large"]
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
      A row a contestant; the first is ours, the last copies of the input: what XLA
      makes of x + 1, and on a GPU also the driver's, which can be faster.
    """
    import jax
    import jax.numpy as jnp

    from benchmarks import libraries, programs, torch_layer

    size = math.prod(shape)
    input_bytes = size * jnp.dtype(dtype).itemsize
    num_sets = min(8, 1 + CACHE_BYTES // (2 * input_bytes))
    sets = _random(shape, num_sets)
    calls: dict[str, Callable[[int], Any]] = {}
    facts: dict[str, dict[str, float]] = {}
    layers, missing = libraries.installed()
    torches = [] if "torch" in missing else list(torch_layer.VARIANTS)
    if jax.default_backend() == "cpu":
        torches = torches[:1]  # whose compiler wants a C++ compiler there
    names = [*layers, *torches] if only is None else only
    repeats = REPEATS.get(jax.default_backend(), REPEATS["gpu"])
    inputs = [[jnp.asarray(a, dtype) for a in pair] for pair in sets]
    for name in (name for name in layers if name in names):
        layer = layers[name](shape, jnp.dtype(dtype), relu)
        own = inputs
        if layer.channels_first:
            own = [[jnp.moveaxis(a, -1, 1) for a in pair] for pair in inputs]
        step, arguments = _step(layer, passes, own)
        if passes == EAGER:
            calls[name] = functools.partial(_call, step, arguments, repeats)
            continue
        step = jax.jit(step)
        compiled = step.lower(*arguments[0]).compile()
        # The jitted function, and not what was compiled, which takes longer to call.
        calls[name] = functools.partial(_call, step, arguments, repeats)
        kept = programs.residual_bytes(layer.forward, layer.params, own[0][0])
        facts[name] = {
            "temporary": programs.temporary_bytes(compiled) / input_bytes,
            "kept": kept / input_bytes,
            "written": programs.large_results(compiled.as_text() or "", size // 2),
        }
    for name in (name for name in torches if name in names):
        steps = [
            torch_layer.step(
                *pair,
                bfloat16=dtype == "bfloat16",
                relu=relu,
                passes=passes,
                compiled=torch_layer.VARIANTS[name],
            )
            for pair in sets
        ]
        calls[name] = functools.partial(_call_torch, steps, repeats)
    copies = {"copy": functools.partial(_call, jax.jit(_copy), inputs, repeats)}
    if torches and repeats > 1:
        steps = [torch_layer.copy(x, dtype == "bfloat16") for x, _ in sets]
        copies["copy by torch"] = functools.partial(_call_torch, steps, repeats)
    timings = measuring.time_in_turns(calls | copies, rounds, repeats)
    limit = PASSES[passes] / 2 * min(timings[name].median for name in copies)
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


def _step(
    layer: Any, passes: str, inputs: Sequence[Sequence[Any]]
) -> tuple[Callable[..., Any], list[tuple[Any, ...]]]:
    """What is timed, and its arguments for each set of inputs."""
    import jax

    def forward(params: Any, x: Any) -> tuple[Any, Any, Any]:
        return jax.vjp(layer.forward, params, x, has_aux=True)

    def both(params: Any, x: Any, dy: Any) -> Any:
        y, pullback, stats = forward(params, x)
        return y, pullback(dy.astype(y.dtype)), stats

    if passes == "forward and backward":
        return both, [(layer.params, x, dy) for x, dy in inputs]
    if passes in ("forward", EAGER):
        return layer.forward, [(layer.params, x) for x, _ in inputs]
    run = jax.jit(forward)
    kept = [(run(layer.params, x), dy) for x, dy in inputs]
    # Its own gradient's dtype is that of its output.
    return lambda pullback, dy: pullback(dy), [
        (pullback, dy.astype(y.dtype)) for (y, pullback, _), dy in kept
    ]


def _copy(x: Any, dy: Any) -> Any:
    del dy
    return x + 1


def _call(
    step: Callable[..., Any],
    arguments: Sequence[Sequence[Any]],
    repeats: int,
    turn: int,
) -> None:
    import jax

    for number in range(repeats):
        result = step(*arguments[(turn + number) % len(arguments)])
    jax.block_until_ready(result)


def _call_torch(steps: Sequence[Callable[[], None]], repeats: int, turn: int) -> None:
    from benchmarks import torch_layer

    for number in range(repeats):
        steps[(turn + number) % len(steps)]()
    torch_layer.wait()


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
        if len(row["shape"]) == 4 and row["name"] not in NOT_COMPARED:
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
        large="anything: batch 256, too, which wants 16 GB and an hour",
        dtypes="only these, as bfloat16,float32",
        passes="only these, of forward,backward,forward and backward",
        only="only these contestants, as bn_jax,flax.linen",
    )


if __name__ == "__main__":
    given = flags()
    measuring.prepare(given.cores)
    main(given)
