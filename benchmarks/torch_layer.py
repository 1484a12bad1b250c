"""Torch's layer in training, to be timed."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks import libraries

# Torch as it is, and what its compiler makes of it: whether that is asked for.
VARIANTS = {"torch": False, "torch, compiled": True}


def step(
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

    dtype = torch.bfloat16 if bfloat16 else torch.float32

    def convert(array: np.ndarray) -> Any:
        tensor = torch.from_numpy(array.copy()).to(device(), dtype)
        return tensor.permute(0, 3, 1, 2) if array.ndim == 4 else tensor

    backward = "backward" in passes
    layer = libraries.torch_module(x.shape, libraries.DECAY, device())
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


def copy(x: np.ndarray, bfloat16: bool) -> Callable[[], Any]:
    """A copy of an array by the driver; on a GPU it is not waited for."""
    import torch

    dtype = torch.bfloat16 if bfloat16 else torch.float32
    source = torch.from_numpy(x.copy()).to(device(), dtype)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def device() -> str:
    """Where torch computes: on the same kind of device as JAX."""
    return "cuda" if jax.default_backend() == "gpu" else "cpu"


def wait() -> None:
    """Waits for what torch has under way."""
    import torch

    if device() == "cuda":
        torch.cuda.synchronize()
