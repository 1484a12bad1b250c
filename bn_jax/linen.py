"""Batch normalisation as a Flax linen module: variables and defaults, no arithmetic."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from bn_jax.collectives import AxisIndexGroups, AxisName
from bn_jax.layout import make_layout
from bn_jax.params import BatchNormParams
from bn_jax.statistics import BatchStats
from bn_jax.transform import batch_norm


class BatchNorm(nn.Module):
    """`bn_jax.batch_norm` with its parameters and statistics as Flax variables.

    Variables are named as `flax.linen.BatchNorm` names them: `scale` and `bias` in
    the collection `params`, `mean` and `var` in `batch_stats`; all (features), float32.

    Attributes:
      use_running_average: normalise by the statistics (inference) rather than by the
        batch (training). Here or in the call.
      axis: the feature axis or axes.
      momentum: the statistics' decay: new = momentum * old + (1 - momentum) * batch.
      epsilon: added to the variance.
      use_bias: learn a bias (beta).
      use_scale: learn a scale (gamma).
      bias_init: initialises the bias.
      scale_init: initialises the scale.
      axis_name: mapped axis or axes to share moments over. Ignored in `init`, which
        runs outside the map.
      axis_index_groups: groups along that axis that share among themselves only.
      activation: None, or "relu" fused into the transform.
      unbiased: unbiased running variance, as the paper's Algorithm 2 has it.
    """

    use_running_average: bool | None = None
    axis: int | Sequence[int] = -1
    momentum: float = 0.99
    epsilon: float = 1e-5
    use_bias: bool = True
    use_scale: bool = True
    bias_init: nn.initializers.Initializer = nn.initializers.zeros
    scale_init: nn.initializers.Initializer = nn.initializers.ones
    axis_name: AxisName | None = None
    axis_index_groups: AxisIndexGroups | None = None
    activation: str | None = None
    unbiased: bool = True

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        weights: jax.Array | None = None,
    ) -> jax.Array:
        """Normalises x, and in training updates the collection `batch_stats`.

        Args:
          x: any rank, floating point.
          use_running_average: as the attribute of that name; give one of the two.
          weights: 0 for padding, or example weights; see `bn_jax.batch_norm`.

        Returns:
          The normalised input, of x's shape and dtype.

        Raises:
          ValueError: `use_running_average` is missing or given twice, the variables
            hold parameters but no statistics, or an argument of `bn_jax.batch_norm` is
            bad.
        """
        use_running_average = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        features = make_layout(x.shape, self.axis).feature_shape
        if not (self.is_initializing() or self.has_variable("batch_stats", "mean")):
            raise ValueError(
                f"the variables of {'/'.join(self.path) or 'BatchNorm'} hold no "
                "batch_stats: they would start again at mean 0 and variance 1. Pass "
                "{'params': ..., 'batch_stats': ...}, both from init or a checkpoint."
            )
        mean = self.variable("batch_stats", "mean", jnp.zeros, features, jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, features, jnp.float32)
        params = BatchNormParams(
            self.param("scale", self.scale_init, features) if self.use_scale else None,
            self.param("bias", self.bias_init, features) if self.use_bias else None,
        )
        if self.is_initializing():
            # Shapes are all that init needs, and it may run on a single example.
            return x
        y, stats = batch_norm(
            params,
            BatchStats(mean.value, var.value),
            x,
            train=not use_running_average,
            axis=self.axis,
            decay=self.momentum,
            eps=self.epsilon,
            weights=weights,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            activation=self.activation,
            unbiased=self.unbiased,
        )
        if not use_running_average:
            mean.value, var.value = stats
        return y
