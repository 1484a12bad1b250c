"""The fully connected network of section 4.1."""

import flax.linen as nn
import jax

import bn_jax.linen
from bn_jax.collectives import AxisIndexGroups, AxisName


class MLP(nn.Module):
    """Sigmoid layers, each z = g(BN(W u)) or z = g(W u + b), then a linear layer.

    With batch normalisation the hidden layers have no bias of their own: the mean
    subtraction cancels it, and BN's takes its place (section 3.2).

    Attributes:
      hidden: units of each hidden layer.
      num_classes: outputs.
      batch_norm: normalise the input of each sigmoid.
      initial_std: standard deviation of the Gaussian that weights start from. May be
        traced.
      decay: share of the old statistics that stays in their moving average.
      epsilon: added to the variance.
      axis_name: mapped axis to share moments over.
      axis_index_groups: groups of devices along it that share them; None: all do.
    """

    hidden: tuple[int, ...] = (100, 100, 100)
    num_classes: int = 10
    batch_norm: bool = True
    initial_std: float | jax.Array = 0.1
    decay: float = 0.99
    epsilon: float = 1e-3
    axis_name: AxisName | None = None
    axis_index_groups: AxisIndexGroups | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Computes the logits.

        Args:
          x: (batch, inputs), float32.
          train: normalise by the batch, and update `batch_stats`.

        Returns:
          Logits, (batch, classes), float32. The input of the last hidden layer's
          sigmoid is sown as `intermediates/sigmoid_input`, (batch, units).
        """
        init = nn.initializers.normal(self.initial_std)
        for layer, units in enumerate(self.hidden):
            x = nn.Dense(units, use_bias=not self.batch_norm, kernel_init=init)(x)
            if self.batch_norm:
                x = bn_jax.linen.BatchNorm(
                    use_running_average=not train,
                    momentum=self.decay,
                    epsilon=self.epsilon,
                    axis_name=self.axis_name,
                    axis_index_groups=self.axis_index_groups,
                )(x)
            if layer == len(self.hidden) - 1:
                self.sow("intermediates", "sigmoid_input", x)
            x = nn.sigmoid(x)
        return nn.Dense(self.num_classes, kernel_init=init)(x)
