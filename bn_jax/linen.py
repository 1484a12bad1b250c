"""Batch normalisation as a Flax linen module: variables and defaults, no arithmetic."""

from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from bn_jax.activations import ActivationName
from bn_jax.batch_norm import Limits
from bn_jax.collectives import AxisName
from bn_jax.drop_in import apply_module, check_constructor
from bn_jax.gathering import GATHERING
from bn_jax.layout import make_layout
from bn_jax.params import BatchNormParams
from bn_jax.statistics import BatchStats


class BatchNorm(nn.BatchNorm):
    """`flax.linen.BatchNorm` computed by `bn_jax.batch_norm`.

    It is that class's constructor with that class's defaults, and the same variables:
    `scale` and `bias` in the collection `params`, `mean` and `var` in `batch_stats`. So
    a model changes one import, and variables restore in both directions.
    docs/flax_modules.md lists what differs on purpose. The first of these is that the
    running variance is unbiased.

    Attributes:
      use_running_average: normalise by the statistics (inference) rather than by the
        batch (training). Here or in the call.
      axis: the feature axis or axes.
      momentum: the statistics' decay: new = momentum * old + (1 - momentum) * batch.
      epsilon: added to the variance.
      dtype: of the output; None for what the input and the parameters promote to. With
        bfloat16 input, dtype=jnp.bfloat16 halves what is kept for the gradient.
      param_dtype: of scale and bias.
      use_bias: learn a bias (beta).
      use_scale: learn a scale (gamma).
      bias_init: initialises the bias.
      scale_init: initialises the scale.
      axis_name: mapped axis or axes to share moments over. Ignored in `init`, which
        runs outside the map.
      axis_index_groups: groups along that axis that share among themselves only.
      use_fast_variance: of no effect: the variance is always the stable one.
      force_float32_reductions: False keeps the statistics in `param_dtype`. Sums are
        float32 all the same.
      activation: fused into the transform: None, "relu", "relu6", "leaky_relu", "silu"
        or "gelu".
      unbiased: unbiased running variance, as the paper's Algorithm 2 has it. False for
        Flax's.
      frozen: normalise by the statistics in training, too, and leave them as they are;
        scale and bias still learn.
      virtual_batch_size: normalise by virtual batches of so many examples along axis 0;
        see `bn_jax.ghost_batch_norm`.
      renormalisation: limits (r_max, d_max) of batch renormalisation, which may be
        traced; see `bn_jax.batch_renorm`. Here or in the call, which goes first.
      single_value: "error", or "bias" as Flax has it; see `bn_jax.batch_norm`.
      skip_nonfinite: leave the statistics as they are after a batch that is not finite,
        for loss scaling; see `bn_jax.batch_norm`.
    """

    # Wider than Flax has them.
    axis: int | Sequence[int] = -1  # type: ignore[assignment]
    axis_name: AxisName | None = None  # type: ignore[assignment]
    activation: ActivationName | None = None
    unbiased: bool = True
    frozen: bool = False
    virtual_batch_size: int | None = None
    renormalisation: Limits | None = None
    single_value: Literal["error", "bias"] = "error"
    skip_nonfinite: bool = False

    def __post_init__(self) -> None:
        check_constructor(self, nn.BatchNorm, vars(self))
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        mask: ArrayLike | None = None,
        weights: ArrayLike | None = None,
        renormalisation: Limits | None = None,
    ) -> jax.Array:
        """Normalises x, and in training updates the collection `batch_stats`.

        Args:
          x: any rank, real.
          use_running_average: as the attribute of that name; give one of the two.
          mask: True for values that count, False for padding; broadcastable to x.
          weights: 0 for padding, or example weights, instead of a mask; see
            `bn_jax.batch_norm`.
          renormalisation: as the attribute of that name, before which it goes.

        Returns:
          The normalised input, of x's shape; 0 where mask or weights are 0.

        Raises:
          ValueError: `use_running_average` is missing or given twice, the variables
            hold no statistics, or an argument is bad.
        """
        use_running_average = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        train = not (use_running_average or self.frozen)
        initialising = self.is_initializing()
        features = make_layout(jnp.shape(x), self.axis).feature_shape
        if not initialising:
            self._check_statistics()
        dtype = jnp.float32 if self.force_float32_reductions else self.param_dtype
        mean = self.variable("batch_stats", "mean", jnp.zeros, features, dtype)
        var = self.variable("batch_stats", "var", jnp.ones, features, dtype)
        stats: Any = BatchStats(mean.value, var.value)
        gathering: Any = None
        if train and self.has_variable("batch_stats", GATHERING):
            gathering = self.variable("batch_stats", GATHERING)
            stats = gathering.value

        def parameter(name: str, init: nn.initializers.Initializer) -> jax.Array:
            return self.param(name, init, features, self.param_dtype)

        y, stats = apply_module(
            self,
            BatchNormParams(
                parameter("scale", self.scale_init) if self.use_scale else None,
                parameter("bias", self.bias_init) if self.use_bias else None,
            ),
            stats,
            x,
            train=train,
            mask=mask,
            weights=weights,
            renormalisation=renormalisation,
            looking=initialising,
        )
        if gathering is not None:
            gathering.value = stats
        elif train and not initialising:
            mean.value, var.value = stats
        return y

    def _check_statistics(self) -> None:
        for name in ("mean", "var"):
            if not self.has_variable("batch_stats", name):
                raise ValueError(
                    f"the variables of {'/'.join(self.path) or 'BatchNorm'} hold no "
                    f"{name} in batch_stats: it would start again at its initial "
                    "value. Pass {'params': ..., 'batch_stats': ...}, both from init "
                    "or a checkpoint."
                )
