"""Batch normalisation in training, ours and the peers', behind one interface."""

import importlib.util
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import bn_jax

EPSILON = 1e-3
DECAY = 0.99


class Layer(NamedTuple):
    """A layer with its state, as pure functions of arrays."""

    params: Any  # what gradients are taken of
    # (params, x) -> (y, new statistics), with ReLU if asked for
    forward: Callable[[Any, jax.Array], tuple[jax.Array, Any]]
    channels_first: bool = False


def ours(
    shape: tuple[int, ...], dtype: Any, relu: bool, axis_name: str | None = None
) -> Layer:
    """`bn_jax.batch_norm`."""
    del dtype
    stats = bn_jax.init_stats(shape[-1])

    def forward(params: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        return bn_jax.batch_norm(
            *(params, stats, x),
            train=True,
            eps=EPSILON,
            decay=DECAY,
            activation="relu" if relu else None,
            axis_name=axis_name,
        )

    return Layer(bn_jax.init_params(shape[-1]), forward)


def linen(
    shape: tuple[int, ...],
    dtype: Any,
    relu: bool,
    axis_name: str | None = None,
    fast: bool = True,
) -> Layer:
    """`flax.linen.BatchNorm`."""
    import flax.linen as nn

    layer = nn.BatchNorm(
        use_running_average=False,
        momentum=DECAY,
        epsilon=EPSILON,
        dtype=dtype,
        use_fast_variance=fast,
        axis_name=axis_name,
    )
    variables = layer.init(jax.random.key(0), jnp.zeros((2, shape[-1]), dtype))

    def forward(params: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        y, new = layer.apply({**variables, "params": params}, x, mutable="batch_stats")
        return _activate(y, relu), new

    return Layer(variables["params"], forward)


def linen_two_pass(shape: tuple[int, ...], dtype: Any, relu: bool) -> Layer:
    """`flax.linen.BatchNorm(use_fast_variance=False)`."""
    return linen(shape, dtype, relu, fast=False)


def nnx(shape: tuple[int, ...], dtype: Any, relu: bool) -> Layer:
    """`flax.nnx.BatchNorm`."""
    from flax import nnx

    layer = nnx.BatchNorm(
        shape[-1], momentum=DECAY, epsilon=EPSILON, dtype=dtype, rngs=nnx.Rngs(0)
    )
    graph, *states = nnx.split(layer, nnx.Param, ...)
    params, rest = states

    def forward(params: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        merged = nnx.merge(graph, params, rest, copy=True)
        y = merged(x, use_running_average=False)
        return _activate(y, relu), nnx.state(merged, nnx.BatchStat)

    return Layer(params, forward)


def haiku(shape: tuple[int, ...], dtype: Any, relu: bool) -> Layer:
    """`haiku.BatchNorm`."""
    import haiku as hk

    def call(x: jax.Array) -> jax.Array:
        return hk.BatchNorm(True, True, DECAY, eps=EPSILON)(x, is_training=True)

    layer = hk.transform_with_state(call)
    example = jnp.zeros((2, *shape[1:]), dtype)
    params, state = layer.init(jax.random.key(0), example)

    def forward(params: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        y, new = layer.apply(params, state, None, x)
        return _activate(y, relu), new

    return Layer(params, forward)


def equinox(shape: tuple[int, ...], dtype: Any, relu: bool) -> Layer:
    """`equinox.nn.BatchNorm`, mapped over examples with channels first, as it wants."""
    import equinox as eqx

    layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(
        *(shape[-1], "batch"),
        eps=EPSILON,
        momentum=DECAY,
        mode="batch",
        dtype=dtype,
    )
    params, static = eqx.partition(layer, eqx.is_inexact_array)

    def forward(params: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        layer = eqx.combine(params, static)
        y, new = jax.vmap(
            layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None)
        )(x, state)
        return _activate(y, relu), new

    return Layer(params, forward, channels_first=True)


def keras(shape: tuple[int, ...], dtype: Any, relu: bool) -> Layer:
    """`keras.layers.BatchNormalization` on jax."""
    os.environ["KERAS_BACKEND"] = "jax"
    import keras

    policy = "mixed_bfloat16" if dtype == jnp.bfloat16 else "float32"
    layer = keras.layers.BatchNormalization(
        momentum=DECAY, epsilon=EPSILON, dtype=policy
    )
    layer.build(shape)
    params = [variable.value for variable in layer.trainable_variables]
    others = [variable.value for variable in layer.non_trainable_variables]

    def forward(params: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        y, new = layer.stateless_call(params, others, x, training=True)
        return _activate(y, relu), new

    return Layer(params, forward)


def _activate(y: jax.Array, relu: bool) -> jax.Array:
    return jax.nn.relu(y) if relu else y


# The package that each needs, and what makes it. Ours is first: others are compared
# with it, and flax's default second.
JAX_LAYERS: Mapping[str, tuple[str, Callable[..., Layer]]] = {
    "bn_jax": ("bn_jax", ours),
    "flax.linen": ("flax", linen),
    "flax.linen, two passes": ("flax", linen_two_pass),
    "flax.nnx": ("flax", nnx),
    "haiku": ("haiku", haiku),
    "equinox": ("equinox", equinox),
    "keras on jax": ("keras", keras),
}


def installed() -> tuple[dict[str, Callable[..., Layer]], list[str]]:
    """The layers whose packages are there, and the names of the others."""
    found, missing = {}, []
    for name, (package, make) in JAX_LAYERS.items():
        if importlib.util.find_spec(package):
            found[name] = make
        else:
            missing.append(name)
    if not importlib.util.find_spec("torch"):
        missing.append("torch")
    return found, missing


# Torch as it is, and what its compiler makes of it: whether that is asked for.
TORCH = {"torch": False, "torch, compiled": True}


def torch_step(
    x: np.ndarray,
    dy: np.ndarray,
    *,
    bfloat16: bool,
    relu: bool,
    passes: str,
    compiled: bool = False,
) -> Callable[[], None]:
    """One call of torch's layer in training, on the same kind of device as JAX's.

    Args:
      x: the input, features last, float32; channels_last in torch where it has images.
      dy: the output's gradient.
      bfloat16: convert both.
      relu: apply ReLU, which torch does in an operation of its own.
      passes: of `benchmarks.op`.
      compiled: by `torch.compile`.

    Returns:
      The call, which on a GPU is not waited for.
    """
    import torch
    import torch._functorch.config

    device = torch_device()
    dtype = torch.bfloat16 if bfloat16 else torch.float32

    def convert(array: np.ndarray) -> Any:
        tensor = torch.from_numpy(array.copy()).to(device, dtype)
        return tensor.permute(0, 3, 1, 2) if array.ndim == 4 else tensor

    backward = "backward" in passes
    layer_type = torch.nn.BatchNorm2d if x.ndim == 4 else torch.nn.BatchNorm1d
    layer = layer_type(x.shape[-1], eps=EPSILON, momentum=1 - DECAY, device=device)
    network = torch.nn.Sequential(layer, torch.nn.ReLU()) if relu else layer
    forward = torch.compile(network) if compiled else network
    inputs, gradient = convert(x).requires_grad_(backward), convert(dy)
    kept = None
    if passes == "backward":
        # One forward pass serves many backward ones: none may overwrite what it left.
        torch._functorch.config.donated_buffer = False
        kept = forward(inputs)

    def call() -> None:
        inputs.grad = layer.weight.grad = layer.bias.grad = None
        if kept is not None:
            kept.backward(gradient, retain_graph=True)
            return
        with torch.set_grad_enabled(backward):
            y = forward(inputs)
        if backward:
            y.backward(gradient)

    return call


def torch_copy(x: np.ndarray, bfloat16: bool) -> Callable[[], Any]:
    """A copy of an array by the driver; on a GPU it is not waited for."""
    import torch

    dtype = torch.bfloat16 if bfloat16 else torch.float32
    source = torch.from_numpy(x.copy()).to(torch_device(), dtype)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def torch_device() -> str:
    """Where torch computes: on the same kind of device as JAX."""
    return "cuda" if jax.default_backend() == "gpu" else "cpu"


def torch_wait() -> None:
    """Waits for what torch has under way."""
    import torch

    if torch_device() == "cuda":
        torch.cuda.synchronize()
