"""What a network is made of: shapes, parameters and multiply-adds, from its trace."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.inception.layers import SeparableConv


class Layer(NamedTuple):
    """One of a network's outermost submodules, for an input of one image."""

    name: str
    output_shape: tuple[int, ...]  # without the batch
    parameters: int
    weight_layers: int  # convolutions and dense layers
    multiply_adds: int  # of these


def describe(model: nn.Module, image_shape: tuple[int, ...]) -> tuple[Layer, ...]:
    """Describes the outermost layers of an image classifier, in the order they run.

    Nothing is computed: shapes are traced.

    Args:
      model: called as model(images, train=...), with its layers named.
      image_shape: height, width and channels.

    Returns:
      A description a layer. Dropout, which has nothing to count, is left out.
    """
    outputs: dict[str, tuple[int, ...]] = {}
    weight_layers: dict[str, list[int]] = {}

    def watch(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        output = call(*args, **kwargs)
        module = context.module
        if context.method_name != "__call__" or not module.path:
            return output
        name = module.path[0]
        if isinstance(module, nn.Conv | nn.Dense | SeparableConv):
            positions = math.prod(output.shape[1:-1])
            for key, kernel in module.variables["params"].items():
                if key.endswith("kernel"):
                    multiply_adds = positions * math.prod(kernel.shape)
                    weight_layers.setdefault(name, []).append(multiply_adds)
        if len(module.path) == 1 and not isinstance(module, nn.Dropout):
            outputs[name] = output.shape[1:]
        return output

    def run(key: jax.Array, images: jax.Array) -> Any:
        with nn.intercept_methods(watch):
            return model.init({"params": key, "dropout": key}, images, train=True)

    images = jnp.zeros((1, *image_shape))
    params = jax.eval_shape(run, jax.random.key(0), images)["params"]
    return tuple(
        Layer(
            name=name,
            output_shape=shape,
            parameters=sum(leaf.size for leaf in jax.tree.leaves(params[name])),
            weight_layers=len(weight_layers[name]),
            multiply_adds=sum(weight_layers[name]),
        )
        for name, shape in outputs.items()
    )


def as_table(layers: Sequence[Layer]) -> str:
    """The layers and their sums, as text for a terminal."""
    sums = [
        sum(numbers) for numbers in zip(*(layer[2:] for layer in layers), strict=True)
    ]
    rows = [
        ("layer", "output", "parameters", "weight layers", "multiply-adds"),
        *(
            (layer.name, "x".join(map(str, layer.output_shape)), *_commas(layer[2:]))
            for layer in layers
        ),
        ("total", "", *_commas(sums)),
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [
                *(
                    cell.ljust(width)
                    for cell, width in zip(row[:2], widths, strict=False)
                ),
                *(
                    cell.rjust(width)
                    for cell, width in zip(row[2:], widths[2:], strict=True)
                ),
            ]
        )
        for row in rows
    )


def _commas(numbers: Iterable[int]) -> list[str]:
    return [f"{number:,}" for number in numbers]
