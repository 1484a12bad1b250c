"""Activations fused into batch normalisation, beside the same ones applied after it.

Training forward and backward, the passes in turns. `kept` is what reverse mode keeps
between them, in units of the input.
"""

import argparse
import functools
import itertools
from collections.abc import Callable
from typing import Any, get_args

import bn_jax
from benchmarks import measuring, programs, results
from bn_jax.activations import ActivationName

SHAPE, TINY = (32, 28, 28, 320), (4, 6, 6, 8)
DTYPES = ("float32", "bfloat16")
ROUNDS = 11


def main(arguments: argparse.Namespace) -> None:
    """Measures, prints a table and writes the results."""
    shape = TINY if arguments.tiny else SHAPE
    rounds = arguments.rounds or (2 if arguments.tiny else ROUNDS)
    machine = results.machine()
    rows = [
        measure(name, dtype, shape, rounds)
        for dtype, name in itertools.product(DTYPES, get_args(ActivationName))
    ]
    print(results.table(list(rows[0]), [list(row.values()) for row in rows]))
    results.write(
        arguments.output, {"machine": machine, "shape": list(shape), "rows": rows}
    )


def measure(
    name: ActivationName, dtype: str, shape: tuple[int, ...], rounds: int
) -> dict[str, Any]:
    """Times one activation both ways.

    Args:
      name: of the activation.
      dtype: of the input.
      shape: of the input, features last.
      rounds: timed calls of each.

    Returns:
      A row: times in milliseconds, what is kept, and the ratio unfused to fused.
    """
    import jax
    import jax.numpy as jnp

    params, stats = bn_jax.init_params(shape[-1]), bn_jax.init_stats(shape[-1])
    train = functools.partial(bn_jax.batch_norm, train=True)

    def fused(params: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        return train(params, stats, x, activation=name)

    def apart(params: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        y, new = train(params, stats, x)
        return getattr(jax.nn, name)(y), new

    x, dy = (jax.random.normal(jax.random.key(i), shape, dtype) for i in range(2))
    calls, kept = {}, {}
    for label, forward in (("fused", fused), ("apart", apart)):
        calls[label] = _call(forward, params, x, dy)
        residuals = programs.residual_bytes(forward, params, x)
        kept[label] = residuals / (x.size * jnp.dtype(dtype).itemsize)
    timings = measuring.time_in_turns(calls, rounds)
    return {
        "activation": name,
        "dtype": dtype,
        "fused, ms": timings["fused"].median,
        "apart, ms": timings["apart"].median,
        "apart / fused": timings["apart"].ratio,
        "kept, fused": kept["fused"],
        "kept, apart": kept["apart"],
    }


def _call(
    forward: Callable[..., Any], params: Any, x: Any, dy: Any
) -> Callable[[int], None]:
    import jax

    @jax.jit
    def step(params: Any, x: Any, dy: Any) -> Any:
        y, pullback, new = jax.vjp(forward, params, x, has_aux=True)
        return y, pullback(dy), new

    def call(_: int) -> None:
        jax.block_until_ready(step(params, x, dy))

    return call


if __name__ == "__main__":
    given = results.parse(__doc__, "activations")
    measuring.prepare(given.cores)
    main(given)
