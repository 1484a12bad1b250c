"""An LSTM that reads an image step by step, and then names its class."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bn_jax.collectives import AxisIndexGroups, AxisName
from bn_jax.linen_recurrent import RNN, BatchNormLSTMCell
from bn_jax.recurrent import LSTM


class SequenceClassifier(nn.Module):
    """Reads pixels in order, or in one random order, and classifies at the end.

    Attributes:
      units: of the LSTM.
      num_classes: outputs.
      batch_norm: normalise all terms of the LSTM.
      pixels_per_step: of each time step.
      permutation_seed: of the random order; None: in order.
      initial_scale: of the normalised terms.
      initial_noise: standard deviation of the first hidden state. While all pixels are
        black the variance over examples would be 0, and what little the examples of an
        evaluation differ by would be enlarged without end.
      forget_bias: of the forget gate, initially.
      decay: share of the old statistics that stays in their moving average.
      epsilon: added to the variance.
      axis_name: mapped axis to share moments over.
      axis_index_groups: groups of devices along it that share them; None: all do.
    """

    units: int
    num_classes: int
    batch_norm: bool
    pixels_per_step: int
    permutation_seed: int | None = None
    initial_scale: float = 0.1
    initial_noise: float = 0.1
    forget_bias: float = 1.0
    decay: float = 0.99
    epsilon: float = 1e-5
    axis_name: AxisName | None = None
    axis_index_groups: AxisIndexGroups | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Computes the logits.

        Args:
          x: (batch, pixels), float32; of pixels a multiple of `pixels_per_step`.
          train: normalise by the batch, and update `batch_stats`.

        Returns:
          Logits, (batch, classes), float32.
        """
        examples, pixels = x.shape
        if self.permutation_seed is not None:
            order = np.random.default_rng(self.permutation_seed).permutation(pixels)
            x = x[:, order]
        x = x.reshape(examples, -1, self.pixels_per_step)
        cell = BatchNormLSTMCell(
            self.units,
            max_steps=x.shape[1],
            use_running_average=not train,
            terms=LSTM.terms if self.batch_norm else (),
            momentum=self.decay,
            epsilon=self.epsilon,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            recurrent_kernel_init=_remember,
            bias_init=self._init_bias,
            scale_init=nn.initializers.constant(self.initial_scale),
        )
        carry = cell.initialize_carry(jax.random.key(0), (examples, x.shape[-1]))
        # The same in every batch, in whose places come other examples.
        noise = jax.random.normal(jax.random.key(0), carry.hidden.shape)
        carry = carry._replace(hidden=self.initial_noise * noise)
        carry, _ = RNN(cell, return_carry=True)(x, initial_carry=carry)
        return nn.Dense(self.num_classes)(carry.hidden)

    def _init_bias(
        self, key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype
    ) -> jax.Array:
        del key
        gates = jnp.zeros((LSTM.num_gates, self.units), dtype)
        return gates.at[1].set(self.forget_bias).reshape(shape)


def _remember(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """The identity for the candidate, orthogonal for the gates, as the authors'."""
    units = shape[0]
    admit, keep, emit = jnp.split(
        nn.initializers.orthogonal()(key, (units, 3 * units), dtype), 3, axis=1
    )
    return jnp.concatenate([admit, keep, jnp.eye(units, dtype=dtype), emit], axis=1)
