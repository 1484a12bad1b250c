"""Batch normalisation in training, ours and others', behind one interface."""

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import bn_jax
from benchmarks.results import version

EPSILON = 1e-3
DECAY = 0.99

Shape = tuple[int, ...]


class Layer(NamedTuple):
    """A layer with its state, as pure functions of arrays."""

    params: Any  # what gradients are taken of
    # (params, x) -> (y, new statistics), with ReLU if asked for. Those that take masks
    # take one, whose last axis has size 1, after x.
    forward: Callable[..., tuple[Any, Any]]
    statistics: Callable[[Any], tuple[Any, Any]]  # mean and variance of the new ones
    channels_first: bool = False


def ours(
    shape: Shape, dtype: Any, relu: bool = False, decay: float = DECAY, **options: Any
) -> Layer:
    """`bn_jax.batch_norm`."""
    del dtype
    stats = bn_jax.init_stats(shape[-1])

    def forward(params: Any, x: jax.Array, mask: Any = None) -> tuple[Any, Any]:
        return bn_jax.batch_norm(
            *(params, stats, x),
            train=True,
            eps=EPSILON,
            decay=decay,
            activation="relu" if relu else None,
            weights=mask,
            **options,
        )

    params = bn_jax.init_params(shape[-1])
    return Layer(params, forward, lambda new: (new.mean, new.var))


def linen(
    shape: Shape, dtype: Any, relu: bool = False, decay: float = DECAY, **options: Any
) -> Layer:
    """`flax.linen.BatchNorm`."""
    import flax.linen as nn

    layer = nn.BatchNorm(
        use_running_average=False,
        momentum=decay,
        epsilon=EPSILON,
        dtype=dtype,
        **options,
    )
    variables = layer.init(jax.random.key(0), jnp.zeros((2, shape[-1]), dtype))

    def forward(params: Any, x: jax.Array, mask: Any = None) -> tuple[Any, Any]:
        y, new = layer.apply(
            {**variables, "params": params}, x, mask=mask, mutable="batch_stats"
        )
        return _activate(y, relu), new["batch_stats"]

    return Layer(variables["params"], forward, lambda new: (new["mean"], new["var"]))


def nnx(
    shape: Shape, dtype: Any, relu: bool = False, decay: float = DECAY, **options: Any
) -> Layer:
    """`flax.nnx.BatchNorm`."""
    from flax import nnx

    layer = nnx.BatchNorm(
        shape[-1],
        momentum=decay,
        epsilon=EPSILON,
        dtype=dtype,
        rngs=nnx.Rngs(0),
        **options,
    )
    graph, *states = nnx.split(layer, nnx.Param, ...)
    params, rest = states

    def forward(params: Any, x: jax.Array, mask: Any = None) -> tuple[Any, Any]:
        merged = nnx.merge(graph, params, rest, copy=True)
        y = merged(x, use_running_average=False, mask=mask)
        return _activate(y, relu), nnx.state(merged, nnx.BatchStat)

    return Layer(params, forward, lambda new: (new["mean"][...], new["var"][...]))


def haiku(shape: Shape, dtype: Any, relu: bool = False, decay: float = DECAY) -> Layer:
    """`haiku.BatchNorm`."""
    import haiku as hk

    def call(x: jax.Array) -> jax.Array:
        return hk.BatchNorm(True, True, decay, eps=EPSILON)(x, is_training=True)

    layer = hk.transform_with_state(call)
    example = jnp.zeros((2, *shape[1:]), dtype)
    params, state = layer.init(jax.random.key(0), example)

    def forward(params: Any, x: jax.Array) -> tuple[Any, Any]:
        y, new = layer.apply(params, state, None, x)
        return _activate(y, relu), new

    def statistics(new: Any) -> tuple[Any, Any]:
        mean, var = (new[f"batch_norm/~/{name}_ema"] for name in ("mean", "var"))
        return mean["average"].reshape(-1), var["average"].reshape(-1)

    return Layer(params, forward, statistics)


def equinox(
    shape: Shape, dtype: Any, relu: bool = False, decay: float = DECAY
) -> Layer:
    """`equinox.nn.BatchNorm`, mapped over examples with channels first, as it wants."""
    import equinox as eqx

    layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(
        *(shape[-1], "batch"),
        eps=EPSILON,
        momentum=decay,
        mode="batch",
        dtype=dtype,
    )
    params, static = eqx.partition(layer, eqx.is_inexact_array)

    def forward(params: Any, x: jax.Array) -> tuple[Any, Any]:
        layer = eqx.combine(params, static)
        y, new = jax.vmap(
            layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None)
        )(x, state)
        return _activate(y, relu), new

    def statistics(new: Any) -> tuple[Any, Any]:
        return new.get(layer.batch_state_index)

    return Layer(params, forward, statistics, channels_first=True)


def keras(shape: Shape, dtype: Any, relu: bool = False, decay: float = DECAY) -> Layer:
    """`keras.layers.BatchNormalization` on jax."""
    os.environ["KERAS_BACKEND"] = "jax"
    import keras

    policy = "mixed_bfloat16" if dtype == jnp.bfloat16 else "float32"
    layer = keras.layers.BatchNormalization(
        momentum=decay, epsilon=EPSILON, dtype=policy
    )
    layer.build(shape)
    params = [variable.value for variable in layer.trainable_variables]
    others = [variable.value for variable in layer.non_trainable_variables]

    def forward(params: Any, x: jax.Array, mask: Any = None) -> tuple[Any, Any]:
        y, new = layer.stateless_call(
            *(params, others, x),
            training=True,
            mask=None if mask is None else mask[..., 0],
        )
        return _activate(y, relu), new

    return Layer(params, forward, lambda new: (new[0], new[1]))


def torch(shape: Shape, dtype: Any, relu: bool = False, decay: float = DECAY) -> Layer:
    """Torch's module on the CPU, of and to arrays of NumPy; JAX cannot trace it."""
    import torch

    layer = torch_module(shape, decay, "cpu")

    def forward(params: Any, x: Any) -> tuple[Any, Any]:
        del params  # which are the module's own
        tensor = torch.from_numpy(np.array(x, np.float32))
        y = layer(tensor.to(torch.bfloat16 if dtype == jnp.bfloat16 else torch.float32))
        y = torch.relu(y) if relu else y
        return y.detach().float().numpy(), (layer.running_mean, layer.running_var)

    return Layer(None, forward, lambda new: (new[0].numpy(), new[1].numpy()))


def torch_module(shape: Shape, decay: float, device: str) -> Any:
    """`torch.nn.BatchNorm2d` for images, else `torch.nn.BatchNorm1d`."""
    from torch import nn

    layer_type = nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d
    return layer_type(shape[-1], eps=EPSILON, momentum=1 - decay, device=device)


def _activate(y: jax.Array, relu: bool) -> jax.Array:
    return jax.nn.relu(y) if relu else y


class Library(NamedTuple):
    """How a library is reached."""

    package: str  # its distribution
    make: Callable[..., Layer]  # of shape, dtype, relu, decay and what else it takes
    masks: bool = False
    speed_alone: bool = False  # a variant, whose features are the library's


# Ours is first: others are compared with it, and flax's default second.
LIBRARIES: Mapping[str, Library] = {
    "bn_jax": Library("jax", ours, masks=True),
    "flax.linen": Library("flax", linen, masks=True),
    "flax.linen, two passes": Library(
        *("flax", functools.partial(linen, use_fast_variance=False)),
        speed_alone=True,
    ),
    "flax.nnx": Library("flax", nnx, masks=True),
    "haiku": Library("dm-haiku", haiku),
    "equinox": Library("equinox", equinox),
    "keras on jax": Library("keras", keras, masks=True),
    "torch": Library("torch", torch),
}
JAX_LAYERS = {name: lib.make for name, lib in LIBRARIES.items() if name != "torch"}


def installed() -> tuple[dict[str, Callable[..., Layer]], list[str]]:
    """JAX's layers whose libraries are there, and the names of those that are not."""
    missing = [name for name, lib in LIBRARIES.items() if not version(lib.package)]
    return {n: make for n, make in JAX_LAYERS.items() if n not in missing}, missing
