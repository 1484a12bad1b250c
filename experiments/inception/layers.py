"""Layers of a convolutional network: g(BN(W u)), pools, response normalisation."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

# Called with axis, dtype, name and, for ReLU, activation.
Norm = Callable[..., nn.Module]
Padding = str | Sequence[tuple[int, int]]

ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "relu": nn.relu,
    "sigmoid": nn.sigmoid,
    "tanh": nn.tanh,
}
CONVOLUTION_OUTPUT = "convolution_output"  # what rematerialisation starts from
DEPTH_MULTIPLIER = 8  # of a separable convolution


def drawn_as_matrix(
    initialise: nn.initializers.Initializer,
) -> nn.initializers.Initializer:
    """The same numbers for a kernel, drawn in the shape (inputs, outputs).

    XLA on CPU unrolls its loops over the small sides of a kernel: random numbers in
    that shape take seconds to compile, those of all Inception more than a minute.

    Args:
      initialise: its deviation may depend on the number of inputs and on nothing else.
    """

    def initialise_kernel(
        key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32
    ) -> jax.Array:
        *inputs, outputs = shape
        return initialise(key, (math.prod(inputs), outputs), dtype).reshape(shape)

    return initialise_kernel


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
      padding: "tensorflow" or "caffe", which differ where a convolution has stride 2,
        and at the edges of averages.
      kernel_init: initialises weights.
      bias_init: initialises biases.
      dtype: of the computation; parameters are float32.
    """

    channels: int
    kernel_size: int = 1
    stride: int = 1
    norm: Norm | None = None
    activation: str = "relu"
    separable: bool = False
    per_activation: bool = False
    padding: str = "tensorflow"
    kernel_init: nn.initializers.Initializer = nn.initializers.he_normal()
    bias_init: nn.initializers.Initializer = nn.initializers.zeros
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (batch, height, width, channels) to the same with other sizes."""
        layer = SeparableConv if self.separable else nn.Conv
        x = layer(
            self.channels,
            (self.kernel_size,) * 2,
            (self.stride,) * 2,
            padding=_pads(self.kernel_size, self.padding),
            use_bias=self.norm is None,
            kernel_init=drawn_as_matrix(self.kernel_init),
            bias_init=self.bias_init,
            dtype=self.dtype,
            name="conv",
        )(x)
        x = checkpoint_name(x, CONVOLUTION_OUTPUT)
        nonlinearity = ACTIVATIONS[self.activation]
        if self.norm is None:
            return nonlinearity(x)
        norm = functools.partial(
            self.norm,
            axis=(1, 2, 3) if self.per_activation else -1,
            dtype=self.dtype,
            name="norm",
        )
        if self.activation == "relu":
            return norm(activation="relu")(x)
        return nonlinearity(norm()(x))


class SeparableConv(nn.Module):
    """One convolution per input channel, `DEPTH_MULTIPLIER` outputs each, and a 1x1.

    There is nothing between the two, so they are computed as the one convolution that
    they amount to: for the three channels of an image that is many times faster than a
    grouped convolution on a CPU, and gives the same up to rounding.

    Attributes:
      features: outputs.
      kernel_size: height and width.
      strides: in both directions.
      padding: as `jax.lax.conv_general_dilated` takes it.
      use_bias: add a bias.
      kernel_init: initialises both kernels.
      bias_init: initialises biases.
      dtype: of the computation; parameters are float32.
    """

    features: int
    kernel_size: tuple[int, int]
    strides: tuple[int, int]
    padding: Padding = "SAME"
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer = nn.initializers.he_normal()
    bias_init: nn.initializers.Initializer = nn.initializers.zeros
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (batch, height, width, inputs) to (batch, ..., features)."""
        inputs = x.shape[-1]
        depthwise = self.param(
            "depthwise_kernel",
            self.kernel_init,
            (*self.kernel_size, 1, inputs * DEPTH_MULTIPLIER),
        )
        pointwise = self.param(
            "pointwise_kernel",
            self.kernel_init,
            (1, 1, inputs * DEPTH_MULTIPLIER, self.features),
        )
        kernel = jnp.einsum(
            "hwim,imo->hwio",
            depthwise.reshape(*self.kernel_size, inputs, DEPTH_MULTIPLIER),
            pointwise.reshape(inputs, DEPTH_MULTIPLIER, self.features),
            precision="highest",
        )
        x = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            self.strides,
            self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,))
            x = x + bias.astype(self.dtype)
        return x


def pool3x3(
    x: jax.Array, kind: str, stride: int, padding: str = "tensorflow"
) -> jax.Array:
    """Maximum or average over 3 x 3 positions.

    The average is that of the positions inside the image; with padding "caffe" those
    outside count as zeros.
    """
    window, strides = (3, 3), (stride, stride)
    if kind == "max":
        return nn.max_pool(x, window, strides, padding="SAME")
    counts = padding == "caffe"
    return nn.avg_pool(x, window, strides, padding="SAME", count_include_pad=counts)


def _pads(kernel_size: int, padding: str) -> Padding:
    if padding == "tensorflow":
        return "SAME"
    return [(kernel_size // 2, kernel_size // 2)] * 2


def local_response_norm(x: jax.Array) -> jax.Array:
    """Divides by (1 + 1e-4 * the mean of x^2 over 5 neighbouring channels)^0.75.

    The form and constants of GoogLeNet's published (Caffe) definition; the paper says
    only that the baseline has it.
    """
    square = jnp.square(x.astype(jnp.float32))
    window = (1, 1, 1, 5)
    # A constant: with a traced zero, JAX does not see that this is a sum.
    zero = np.zeros((), square.dtype)
    total = jax.lax.reduce_window(square, zero, jax.lax.add, window, (1,) * 4, "SAME")
    return (x * (1 + 1e-4 / 5 * total) ** -0.75).astype(x.dtype)
