"""Layers of a convolutional network: g(BN(W u)), pools, response normalisation."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

# Called with axis, name and, for ReLU, activation.
Norm = Callable[..., nn.Module]

ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "relu": nn.relu,
    "sigmoid": nn.sigmoid,
    "tanh": nn.tanh,
}
CONVOLUTION_OUTPUT = "convolution_output"  # what rematerialisation starts from
DEPTH_MULTIPLIER = 8  # of a separable convolution


class Convolution(nn.Module):
    """A convolution, its normalisation and its nonlinearity: z = g(BN(W u)).

    Attributes:
      channels: of the output.
      kernel_size: height and width.
      stride: in both directions.
      norm: makes the normalisation, which replaces the bias; None for none.
      activation: a key of `ACTIVATIONS`.
      separable: one convolution per input channel, then a 1x1 convolution.
      per_activation: one mean and variance per activation, not per feature map.
      kernel_init: initialises weights.
      dtype: of the computation; parameters are float32.
    """

    channels: int
    kernel_size: int = 1
    stride: int = 1
    norm: Norm | None = None
    activation: str = "relu"
    separable: bool = False
    per_activation: bool = False
    kernel_init: nn.initializers.Initializer = nn.initializers.he_normal()
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (batch, height, width, channels) to the same with other sizes."""
        conv = functools.partial(
            nn.Conv, kernel_init=self.kernel_init, dtype=self.dtype
        )
        kernel, strides = (self.kernel_size,) * 2, (self.stride,) * 2
        if self.separable:
            inputs = x.shape[-1]
            x = conv(
                DEPTH_MULTIPLIER * inputs,
                kernel,
                strides,
                feature_group_count=inputs,
                use_bias=False,
                name="depthwise",
            )(x)
            kernel, strides = (1, 1), (1, 1)
        use_bias = self.norm is None
        x = conv(self.channels, kernel, strides, use_bias=use_bias, name="conv")(x)
        x = checkpoint_name(x, CONVOLUTION_OUTPUT)
        nonlinearity = ACTIVATIONS[self.activation]
        if self.norm is None:
            return nonlinearity(x)
        norm = functools.partial(
            self.norm, axis=(1, 2, 3) if self.per_activation else -1, name="norm"
        )
        if self.activation == "relu":
            return norm(activation="relu")(x)
        return nonlinearity(norm()(x))


def pool3x3(x: jax.Array, kind: str, stride: int) -> jax.Array:
    """Maximum, or average of the positions inside the image, over 3 x 3 positions."""
    window, strides = (3, 3), (stride, stride)
    if kind == "max":
        return nn.max_pool(x, window, strides, padding="SAME")
    return nn.avg_pool(x, window, strides, padding="SAME", count_include_pad=False)


def local_response_norm(x: jax.Array) -> jax.Array:
    """Divides by (1 + 1e-4 * the mean of x^2 over 5 neighbouring channels)^0.75.

    The form and constants of GoogLeNet's published (Caffe) definition; the paper says
    only that the baseline has it.
    """
    square = jnp.square(x.astype(jnp.float32))
    window = (1, 1, 1, 5)
    zero = jnp.zeros((), square.dtype)
    total = jax.lax.reduce_window(square, zero, jax.lax.add, window, (1,) * 4, "SAME")
    return (x * (1 + 1e-4 / 5 * total) ** -0.75).astype(x.dtype)
