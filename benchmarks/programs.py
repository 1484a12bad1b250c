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
_INSTRUCTION = re.compile(r"%([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)")
_MASK = re.compile(r"pred\[([\d,]*)\]")
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
    num_bytes: int  # of their operands and results; of sliced operands the slices
    mask_bytes: int  # of results that are booleans, one byte each


def traffic(hlo: str) -> Traffic:
    """Adds up a compiled program; what is inside its loops and branches is left out."""
    start = hlo.index("\nENTRY")
    sliced = {
        f"%{name}": _sliced_parameters(body)
        for name, body in re.findall(
            r"^%([\w.-]+) \(.*?\{\n(.*?)^\}", hlo[:start], re.MULTILINE | re.DOTALL
        )
    }
    types: dict[str, str] = {}
    instructions = num_bytes = mask_bytes = 0
    for line in hlo[start:].splitlines():
        match = _INSTRUCTION.search(line)
        if not match:
            continue
        name, shapes, operation, operands = match.groups()
        types[name] = shapes
        if operation in _FREE:
            continue
        instructions += 1
        mask_bytes += sum(_product(sizes) for sizes in _MASK.findall(shapes))
        num_bytes += _bytes(shapes)
        called = re.search(r"calls=(%[\w.-]+)", line)
        slices = sliced.get(called[1], {}) if called else {}
        for index, operand in enumerate(re.findall(r"%([\w.-]+)", operands)):
            num_bytes += slices.get(index, _bytes(types.get(operand, "")))
    return Traffic(instructions, num_bytes, mask_bytes)


def _sliced_parameters(body: str) -> dict[int, int]:
    """Bytes of the slices of those parameters that only slices are taken of."""
    found = {}
    instructions = _INSTRUCTION.findall(body)
    for name, _, operation, index in instructions:
        if operation != "parameter":
            continue
        users = [
            (operation, shapes)
            for _, shapes, operation, operands in instructions
            if name in re.findall(r"%([\w.-]+)", operands)
        ]
        if users and all(operation == "slice" for operation, _ in users):
            found[int(index)] = sum(_bytes(shapes) for _, shapes in users)
    return found


def _bytes(shapes: str) -> int:
    numbers = sum(
        int(bits) // 8 * _product(sizes) for _, bits, sizes in _ARRAY.findall(shapes)
    )
    return numbers + sum(_product(sizes) for sizes in _MASK.findall(shapes))


def _sizes(shapes: str) -> list[int]:
    return [_product(sizes) for _, _, sizes in _ARRAY.findall(shapes)]


def _product(sizes: str) -> int:
    return math.prod(int(size) for size in sizes.split(",") if size)
