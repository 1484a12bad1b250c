"""ResNet-50 (He et al. 2015), with the stride in the 3x3 convolution as is usual."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from experiments.inception.layers import CONVOLUTION_OUTPUT, drawn_as_matrix

STAGES = ((3, 64), (4, 128), (6, 256), (3, 512))  # blocks, channels of the 3x3
EXPANSION = 4


class ResNet50(nn.Module):
    """An image classifier.

    Attributes:
      norm: called with `activation`, None or "relu", and `dtype`; makes what stands
        between a convolution and the next. None: only the activation.
      num_classes: outputs.
      width: what all channels are multiplied by.
      dtype: of the computation.
    """

    norm: Callable[..., nn.Module] | None
    num_classes: int = 1000
    width: float = 1.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Maps (batch, height, width, 3) to logits, float32."""
        unit = functools.partial(self._unit, train)
        x = unit(images.astype(self.dtype), round(64 * self.width), 7, 2)
        x = nn.max_pool(x, (3, 3), (2, 2), padding="SAME")
        for stage, (blocks, channels) in enumerate(STAGES):
            narrow = round(channels * self.width)
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                y = unit(x, narrow)
                y = unit(y, narrow, 3, stride)
                y = unit(y, narrow * EXPANSION, activation=None)
                if x.shape != y.shape:
                    x = unit(x, narrow * EXPANSION, 1, stride, activation=None)
                x = nn.relu(x + y)
        x = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        return nn.Dense(self.num_classes)(x)

    def _unit(
        self,
        train: bool,
        x: jax.Array,
        channels: int,
        size: int = 1,
        stride: int = 1,
        activation: str | None = "relu",
    ) -> jax.Array:
        x = nn.Conv(
            *(channels, (size, size), (stride, stride)),
            use_bias=self.norm is None,
            kernel_init=drawn_as_matrix(nn.initializers.lecun_normal()),
            dtype=self.dtype,
        )(x)
        x = checkpoint_name(x, CONVOLUTION_OUTPUT)
        if self.norm is None:
            return nn.relu(x) if activation else x
        norm = self.norm(
            use_running_average=not train, activation=activation, dtype=self.dtype
        )
        return norm(x)
