"""What a network is made of: shapes, parameters and multiply-adds, from its trace."""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp


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
        if isinstance(module, nn.Conv | nn.Dense):
            kernel = module.variables["params"]["kernel"]
            positions = math.prod(output.shape[1:-1])
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
