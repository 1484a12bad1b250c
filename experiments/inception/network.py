"""The paper's Inception network, built from the table of its appendix."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import bn_jax
from experiments.inception.initialisation import CLASSIFIER, Initialisation
from experiments.inception.layers import (
    CONVOLUTION_OUTPUT,
    Convolution,
    Norm,
    local_response_norm,
    pool3x3,
)
from experiments.inception.table import STEM_CHANNELS, Row, scaled, table_rows

# For `jax.checkpoint`: what the backward pass keeps when it computes the rest again.
KEEP_CONVOLUTIONS = jax.checkpoint_policies.save_only_these_names(
    CONVOLUTION_OUTPUT, bn_jax.MOMENTS_NAME
)
AUXILIARY_ROW = "4a"  # the auxiliary head looks at its 576 channels


def stem_strides(input_size: int) -> tuple[int, int, int]:
    """Strides of the first convolution and of the two max pools after it.

    The paper's at 224 x 224 are 2, 2, 2. Smaller images keep a map of 14 to 28
    positions a side for the first row, so that the rows after it have something to see.
    """
    if input_size >= 112:
        return 2, 2, 2
    return (2, 2, 1) if input_size >= 56 else (1, 2, 1)


class InceptionBlock(nn.Module):
    """The branches of one row of the table, side by side.

    Attributes:
      row: the row.
      convolution: makes a `Convolution` of the network's kind.
      padding: "tensorflow" or "caffe", for the pool.
    """

    row: Row
    convolution: Callable[..., Convolution]
    padding: str = "tensorflow"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (batch, height, width, channels) to the concatenated branches."""
        row, convolution = self.row, self.convolution
        branches = []
        if row.conv1x1:
            branches.append(convolution(row.conv1x1, name="conv1x1")(x))
        y = convolution(row.reduce3x3, name="reduce3x3")(x)
        branches.append(convolution(row.conv3x3, 3, row.stride, name="conv3x3")(y))
        y = convolution(row.reduce_double3x3, name="reduce_double3x3")(x)
        y = convolution(row.double3x3, 3, name="double3x3_1")(y)
        branches.append(
            convolution(row.double3x3, 3, row.stride, name="double3x3_2")(y)
        )
        y = pool3x3(x, row.pool, row.stride, self.padding)
        if row.pool_projection:
            y = convolution(row.pool_projection, name="pool_projection")(y)
        branches.append(y)
        return jnp.concatenate(branches, axis=-1)


class Inception(nn.Module):
    """The network of section 4.2, in all the forms that the paper compares.

    With `jax.checkpoint(loss, policy=KEEP_CONVOLUTIONS)` the backward pass keeps less
    than half of the activations: normalisations, nonlinearities, pools and
    concatenations are computed again from the outputs of convolutions.

    Attributes:
      num_classes: outputs.
      norm: makes the normalisation before each nonlinearity; None for the baseline.
      activation: a key of `ACTIVATIONS`.
      dropout_rate: before the softmax layer.
      local_response_norm: across neighbouring channels, after the first pool and
        before the second one, where GoogLeNet has it.
      width: what all channels are multiplied by.
      pool_projection: 96 or 128, of rows 4c and 4d.
      separable_stem: factor the first convolution, as the paper does.
      padding: "tensorflow" or "caffe".
      input_shift: added to each channel of the images; () for nothing.
      per_activation_rows: rows whose norm keeps one mean and variance per activation.
      auxiliary_head: a second classifier on row 4a, as GoogLeNet's. The paper names
        none, but only with one does the network have its 13.6 million parameters.
      initialisation: what weights and biases start from.
      dtype: of the computation; parameters and statistics are float32.
    """

    num_classes: int = 1000
    norm: Norm | None = None
    activation: str = "relu"
    dropout_rate: float = 0.0
    local_response_norm: bool = False
    width: float = 1.0
    pool_projection: int = 96
    separable_stem: bool = True
    padding: str = "tensorflow"
    input_shift: tuple[float, ...] = ()
    per_activation_rows: tuple[str, ...] = ()
    auxiliary_head: bool = False
    initialisation: Initialisation = Initialisation()
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, images: jax.Array, *, train: bool
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Computes the logits.

        Args:
          images: (batch, height, width, channels), at least 32 x 32.
          train: normalise by the batch, apply dropout (which takes the random stream
            "dropout"), and return the auxiliary head's logits too.

        Returns:
          Logits, (batch, classes), float32; in training with an auxiliary head the pair
          of both heads' logits.

        Raises:
          ValueError: the table cannot be built as the attributes say.
        """
        norm = self.norm and functools.partial(self.norm, use_running_average=not train)

        def convolution(
            channels: int,
            kernel_size: int = 1,
            stride: int = 1,
            *,
            name: str,
            row: str = "",
            separable: bool = False,
        ) -> Convolution:
            return Convolution(
                channels,
                kernel_size,
                stride,
                norm=norm,
                activation=self.activation,
                padding=self.padding,
                per_activation=row in self.per_activation_rows,
                separable=separable,
                kernel_init=self.initialisation.weights(name, separable=separable),
                bias_init=self.initialisation.biases,
                dtype=self.dtype,
                name=name,
            )

        first, reduced, second = (scaled(c, self.width) for c in STEM_CHANNELS)
        strides = stem_strides(min(images.shape[1:3]))
        respond = local_response_norm if self.local_response_norm else _identity
        x = images.astype(self.dtype)
        if self.input_shift:
            x = x + jnp.asarray(self.input_shift, self.dtype)
        x = convolution(
            first, 7, strides[0], separable=self.separable_stem, name="conv1"
        )(x)
        x = respond(pool3x3(x, "max", strides[1]))
        x = convolution(reduced, name="conv2_reduce")(x)
        x = respond(convolution(second, 3, name="conv2")(x))
        x = pool3x3(x, "max", strides[2])
        auxiliary = None
        for row in table_rows(self.width, self.pool_projection):
            of_row = functools.partial(convolution, row=row.name)
            x = InceptionBlock(row, of_row, self.padding, name=f"row_{row.name}")(x)
            if row.name == AUXILIARY_ROW and self.auxiliary_head:
                auxiliary = AuxiliaryHead(
                    self.num_classes,
                    self.width,
                    convolution,
                    self.initialisation.weights(CLASSIFIER),
                    name="auxiliary",
                )(x)
        x = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        logits = nn.Dense(
            self.num_classes,
            kernel_init=self.initialisation.weights(CLASSIFIER),
            name=CLASSIFIER,
        )(x)
        return logits if auxiliary is None or not train else (logits, auxiliary)


class AuxiliaryHead(nn.Module):
    """GoogLeNet's second classifier.

    Attributes:
      num_classes: outputs.
      width: what its channels are multiplied by.
      convolution: makes a `Convolution` of the network's kind.
      kernel_init: initialises the classifier's weights.
    """

    num_classes: int
    width: float
    convolution: Callable[..., Convolution]
    kernel_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps a row's output to logits, (batch, classes), float32."""
        x = nn.avg_pool(x, (5, 5), (3, 3))
        x = self.convolution(scaled(128, self.width), name="reduce")(x)
        # A dense layer is a 1x1 convolution of a 1x1 map.
        x = x.reshape(len(x), 1, 1, -1)
        x = self.convolution(scaled(768, self.width), name="dense")(x)
        x = x.reshape(len(x), -1).astype(jnp.float32)
        return nn.Dense(
            self.num_classes, kernel_init=self.kernel_init, name=CLASSIFIER
        )(x)


def _identity(x: jax.Array) -> jax.Array:
    return x
