"""On a GPU: what XLA makes of each pass over memory, beside a kernel of Pallas.

Three of the passes of batch normalisation and ReLU: the moments, normalising, and the
sums of the backward pass. A kernel would be kept in bn_jax if it made the whole layer
faster by a tenth or more. Rates are of the bytes that a pass must move; the last rows
are a copy of the input by XLA, in this dtype and, of the same bytes, in float32.
Without a GPU the kernels are interpreted, which tells only whether they are right.
"""

import argparse
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

import bn_jax
from benchmarks import measuring, results

SHAPES = {
    "gpu": [(3_211_264, 64), (802_816, 256), (200_704, 512), (50_176, 1024)],
    "tiny": [(512, 64), (400, 128)],
}
# Rows and columns of a block, warps, and how many blocks sum side by side.
TILES = ((64, 64, 4, 1056), (32, 128, 4, 1056), (16, 128, 4, 1056))
EPSILON = 1e-3
ROUNDS, REPEATS = 5, 10


class Tile(NamedTuple):
    """How a kernel divides an array, (positions, features)."""

    rows: int
    columns: int
    warps: int
    blocks: int


class Pass(NamedTuple):
    """A pass over memory, and how often it moves the bytes of the input."""

    arguments: tuple[jax.Array, ...]
    moved: int
    xla: Callable[..., Any]
    pallas: Callable[..., Any]


def main(arguments: argparse.Namespace) -> None:
    """Measures, prints tables and writes the results."""
    platform = "tiny" if arguments.tiny else "gpu"
    rounds = arguments.rounds or (1 if arguments.tiny else ROUNDS)
    machine = results.machine()
    rows: list[dict[str, Any]] = []
    for shape in SHAPES[platform]:
        measured = [
            row
            for name, each in passes(shape).items()
            for row in measure(shape, name, each, rounds)
        ]
        columns = ("pass", "name", "median", "ratio", "terabytes_per_second")
        print(f"\n{shape[0]}x{shape[1]} bfloat16")
        print(results.table(columns, [[row[c] for c in columns] for row in measured]))
        rows += measured
    results.write(arguments.output, {"machine": machine, "rows": rows})


def passes(shape: tuple[int, int]) -> dict[str, Pass]:
    """The passes, on random values."""
    keys = jax.random.split(jax.random.key(0))
    x, dy = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys)
    moments = jax.jit(bn_jax.moments)(x)
    vectors = (moments.mean, lax.rsqrt(moments.var + EPSILON), 0.1 * moments.mean)
    as_float32 = lax.bitcast_convert_type(x.reshape(shape[0], -1, 2), jnp.float32)
    return {
        "moments": Pass((x,), 1, _moments, pallas_moments),
        "normalise": Pass((x, *vectors), 2, _normalise, pallas_normalise),
        "backward's sums": Pass((x, dy, *vectors), 2, _sums, pallas_sums),
        "copy": Pass((x,), 2, _copy, _no_kernel),
        "copy in float32": Pass((as_float32,), 2, _copy, _no_kernel),
    }


def measure(
    shape: tuple[int, int], name: str, each: Pass, rounds: int
) -> list[dict[str, Any]]:
    """Times XLA's form and the kernel with every tile that divides the features."""
    calls = {"XLA": jax.jit(each.xla)}
    for tile in itertools.starmap(Tile, TILES):
        if each.pallas is not _no_kernel and shape[1] % tile.columns == 0:
            label = f"Pallas, {tile.rows}x{tile.columns}, {tile.warps} warps"
            calls[label] = jax.jit(functools.partial(each.pallas, tile))
    timed = {
        label: functools.partial(_call, call, each.arguments)
        for label, call in calls.items()
    }
    timings = measuring.time_in_turns(timed, rounds, REPEATS)
    moved = each.moved * each.arguments[0].nbytes
    return [
        {
            "shape": list(shape),
            "pass": name,
            "name": label,
            **timing._asdict(),
            "terabytes_per_second": moved / timing.median / 1e9,
        }
        for label, timing in timings.items()
    ]


def _call(
    step: Callable[..., Any], arguments: tuple[jax.Array, ...], turn: int
) -> None:
    del turn
    for _ in range(REPEATS):
        found = step(*arguments)
    jax.block_until_ready(found)


def _copy(x: jax.Array) -> jax.Array:
    return x + 1


def _no_kernel(tile: Tile, *arguments: jax.Array) -> None:
    """Stands where there is nothing to compare XLA with."""


def _moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    found = bn_jax.moments(x)
    return found.mean, found.var


def _normalise(
    x: jax.Array, mean: jax.Array, slope: jax.Array, bias: jax.Array
) -> jax.Array:
    y = (x.astype(jnp.float32) - mean) * slope + bias
    return jnp.maximum(y, 0).astype(x.dtype)


def _terms(
    x: jax.Array, dy: jax.Array, mean: jax.Array, slope: jax.Array, bias: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """What the backward pass sums: dy where ReLU passes it, and that times x - mean."""
    centred = x.astype(jnp.float32) - mean
    passing = jnp.where(centred * slope + bias > 0, dy.astype(jnp.float32), 0)
    return passing, passing * centred


def _sums(*arguments: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(term.sum(0) for term in _terms(*arguments))


def pallas_moments(tile: Tile, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance, (features) each: parts of the rows, merged exactly."""

    def shifted(x: jax.Array, shift: jax.Array) -> tuple[jax.Array, jax.Array]:
        deviation = x.astype(jnp.float32) - shift
        return deviation, deviation * deviation

    parts, rest = _split(tile, x)
    shift = x[: len(x) // 8].astype(jnp.float32).mean(0)
    first, second = _sum_parts(tile, shifted, (parts,), (shift,))
    if len(rest):
        terms = shifted(rest, shift)
        first, second = first + terms[0].sum(0), second + terms[1].sum(0)
    correction = first / len(x)
    return shift + correction, second / len(x) - correction * correction


def pallas_sums(
    tile: Tile, x: jax.Array, dy: jax.Array, *vectors: jax.Array
) -> list[jax.Array]:
    """The sums of the backward pass, (features) each."""
    (x_parts, x_rest), (dy_parts, dy_rest) = _split(tile, x), _split(tile, dy)
    sums = _sum_parts(tile, _terms, (x_parts, dy_parts), vectors)
    if not len(x_rest):
        return sums
    rest = _sums(x_rest, dy_rest, *vectors)
    return [a + b for a, b in zip(sums, rest, strict=True)]


def pallas_normalise(tile: Tile, x: jax.Array, *vectors: jax.Array) -> jax.Array:
    """Normalises and applies ReLU; as many rows as blocks divide."""
    whole = len(x) // tile.rows * tile.rows

    def kernel(x_ref: Any, *refs: Any) -> None:
        *vector_refs, y_ref = refs
        y_ref[...] = _normalise(x_ref[...], *(ref[...] for ref in vector_refs))

    block = pl.BlockSpec((tile.rows, tile.columns), lambda i, j: (i, j))
    y: jax.Array = pl.pallas_call(
        kernel,
        grid=(whole // tile.rows, x.shape[1] // tile.columns),
        in_specs=[block, *[_vector_block(tile)] * len(vectors)],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct((whole, x.shape[1]), x.dtype),
        **_options(tile),
    )(x[:whole], *(vector[None] for vector in vectors))
    if whole == len(x):
        return y
    return jnp.concatenate([y, _normalise(x[whole:], *vectors)])


def _rows_a_block(tile: Tile, shape: tuple[int, ...]) -> int:
    """Rows that one block sums: a multiple of the tile's."""
    blocks = max(1, tile.blocks // (shape[1] // tile.columns))
    tiles = max(1, shape[0] // (blocks * tile.rows))
    return tiles * tile.rows


def _split(tile: Tile, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The rows that whole blocks sum, and the rest."""
    rows = _rows_a_block(tile, x.shape)
    whole = len(x) // rows * rows
    return x[:whole], x[whole:]


def _sum_parts(
    tile: Tile,
    terms: Callable[..., tuple[jax.Array, jax.Array]],
    arrays: tuple[jax.Array, ...],
    vectors: tuple[jax.Array, ...],
) -> list[jax.Array]:
    """Sums two terms over the rows: blocks by a kernel, and their sums by XLA."""
    shape = arrays[0].shape
    rows = _rows_a_block(tile, shape)

    def kernel(*refs: Any) -> None:
        array_refs, rest = refs[: len(arrays)], refs[len(arrays) :]
        values = [ref[...] for ref in rest[: len(vectors)]]

        def add(k: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            piece = pl.ds(k * tile.rows, tile.rows)
            found = terms(*(ref[piece, :] for ref in array_refs), *values)
            return tuple(a + b for a, b in zip(sums, found, strict=True))

        zero = jnp.zeros((tile.rows, tile.columns), jnp.float32)
        sums = lax.fori_loop(0, rows // tile.rows, add, (zero, zero))
        for ref, total in zip(rest[len(vectors) :], sums, strict=True):
            ref[...] = jnp.sum(total, axis=0, keepdims=True)

    partial_sums = pl.pallas_call(
        kernel,
        grid=(shape[0] // rows, shape[1] // tile.columns),
        in_specs=[
            *[pl.BlockSpec((rows, tile.columns), lambda i, j: (i, j))] * len(arrays),
            *[_vector_block(tile)] * len(vectors),
        ],
        out_specs=[pl.BlockSpec((1, tile.columns), lambda i, j: (i, j))] * 2,
        out_shape=[jax.ShapeDtypeStruct((shape[0] // rows, shape[1]), jnp.float32)] * 2,
        **_options(tile),
    )(*arrays, *(vector[None] for vector in vectors))
    return [part.sum(0) for part in partial_sums]


def _vector_block(tile: Tile) -> pl.BlockSpec:
    return pl.BlockSpec((1, tile.columns), lambda i, j: (0, j))


def _options(tile: Tile) -> dict[str, Any]:
    if jax.default_backend() != "gpu":
        return {"interpret": True}
    from jax.experimental.pallas import triton

    return {
        "compiler_params": triton.CompilerParams(num_warps=tile.warps, num_stages=2)
    }


if __name__ == "__main__":
    given = results.parse(__doc__, "pallas")
    if jax.default_backend() != "gpu" and not given.tiny:
        raise SystemExit("error: this needs a GPU; --tiny shows that it runs.")
    main(given)
