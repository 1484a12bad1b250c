"""Facts about compiled programs, which no load on the machine changes."""

import math
import re
from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

_COLLECTIVE = re.compile(
    r"= (\(.*?\)|\S+) (all-reduce|all-gather|all-to-all|reduce-scatter|"
    r"collective-permute|collective-broadcast|ragged-all-to-all)(?:-start)?\("
)
_FREE = ("parameter", "get-tuple-element", "tuple", "bitcast", "constant")
_ARRAY = re.compile(r"([a-z]+)(\d+)\[([\d,]*)\]")


def temporary_bytes(compiled: jax.stages.Compiled) -> int:
    """Peak memory beside arguments and results."""
    analysis: Any = compiled.memory_analysis()
    return int(analysis.temp_size_in_bytes)


def residual_bytes(function: Any, *args: Any) -> int:
    """What reverse mode keeps between the forward and the backward pass."""
    kept = jax.eval_shape(
        lambda *args: jax.vjp(function, *args, has_aux=True)[1], *args
    )
    return sum(
        leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(kept)
    )


def large_results(hlo: str, num_elements: int) -> int:
    """Arrays of at least that size that a program's instructions write."""
    entry = hlo[hlo.index("\nENTRY") :]
    written = 0
    for line in entry.splitlines():
        match = re.search(r"= (\(.*?\)|\S+) ([\w-]+)\(", line)
        if match and match[2] not in ("parameter", "tuple", "bitcast"):
            written += sum(size >= num_elements for size in _sizes(match[1]))
    return written


def collectives(hlo: str) -> tuple[dict[str, int], int]:
    """Counts the collectives of a program, and the bytes of their results."""
    found = _COLLECTIVE.findall(hlo)
    total = sum(_bytes(shapes) for shapes, _ in found)
    return dict(Counter(name for _, name in found)), total


class Traffic(NamedTuple):
    """What the instructions of a program move through memory."""

    instructions: int  # that run; on a GPU kernels, library calls and copies
    num_bytes: int  # of their operands and results, each counted whole
    mask_bytes: int  # of results that are booleans, one byte each


def traffic(hlo: str) -> Traffic:
    """Adds up a compiled program; what is inside its loops and branches is left out."""
    entry = hlo[hlo.index("\nENTRY") :]
    types, counted = {}, []
    for line in entry.splitlines():
        match = re.search(r"%([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)", line)
        if match:
            name, shapes, operation, operands = match.groups()
            types[name] = shapes
            if operation not in _FREE:
                counted.append((shapes, re.findall(r"%([\w.-]+)", operands)))
    return Traffic(
        instructions=len(counted),
        num_bytes=sum(
            _bytes(shapes) + sum(_bytes(types.get(name, "")) for name in operands)
            for shapes, operands in counted
        ),
        mask_bytes=sum(
            _product(sizes)
            for shapes, _ in counted
            for sizes in re.findall(r"pred\[([\d,]*)\]", shapes)
        ),
    )


def _bytes(shapes: str) -> int:
    return sum(
        int(bits) // 8 * _product(sizes) for _, bits, sizes in _ARRAY.findall(shapes)
    ) + sum(_product(sizes) for sizes in re.findall(r"pred\[([\d,]*)\]", shapes))


def _sizes(shapes: str) -> list[int]:
    return [_product(sizes) for _, _, sizes in _ARRAY.findall(shapes)]


def _product(sizes: str) -> int:
    return math.prod(int(size) for size in sizes.split(",") if size)
