"""Batch renormalisation: training sees nearly what inference will compute."""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from bn_jax.activations import ActivationName
from bn_jax.arguments import check
from bn_jax.batch_norm import infer, train_step
from bn_jax.collectives import AxisIndexGroups, AxisName
from bn_jax.params import BatchNormParams
from bn_jax.statistics import BatchStats


def batch_renorm(
    params: BatchNormParams,
    stats: BatchStats,
    x: ArrayLike,
    *,
    train: bool,
    r_max: ArrayLike,
    d_max: ArrayLike,
    axis: int | Sequence[int] = -1,
    decay: ArrayLike = 0.99,
    eps: float = 1e-5,
    weights: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: AxisIndexGroups | None = None,
    activation: ActivationName | None = None,
    unbiased: bool = True,
    single_value: Literal["error", "bias"] = "error",
    skip_nonfinite: bool = False,
) -> tuple[jax.Array, BatchStats]:
    """Batch renormalisation (Ioffe 2017, arXiv 1702.03275), for small batches.

    Training corrects what the batch normalises towards what the statistics would:

      y = scale * (xhat * r + d) + bias
      r = clip(std_batch / std, 1 / r_max, r_max)
      d = clip((mean_batch - mean) / std, -d_max, d_max)

    where xhat is normalised by the batch, mean and std = sqrt(var + eps) are those of
    `stats`, from before this batch, and no gradient flows through r and d. Within the
    limits y is what inference gives; with r_max = 1 and d_max = 0 it is `batch_norm`'s.
    Inference is `batch_norm`'s, and so is the movement of the statistics (the paper
    moves the standard deviation instead of the variance): a network may change from one
    to the other at any step.

    The limits' schedule is the caller's. The paper starts with 1 and 0, since the
    statistics mean nothing yet, and loosens them slowly to 3 and 5.

    Args:
      params: scale and bias, (features) each; None for either leaves it out.
      stats: mean and variance, (features) each, float32 or float64.
      x: any rank; float16, bfloat16, float32 or float64.
      train: normalise by the batch, corrected (True), or by the statistics (False).
      r_max: largest correction of the standard deviation, a factor >= 1, at most
        infinity. A scalar; may be traced.
      d_max: largest correction of the mean, in standard deviations, >= 0, at most
        infinity. A scalar; may be traced.
      axis: the feature axis or axes.
      decay: the statistics become decay * old + (1 - decay) * batch. May be traced.
      eps: added to the variances.
      weights: 0 for padding, or example weights; see `batch_norm`.
      axis_name: mapped axis or axes to share moments over.
      axis_index_groups: groups along that axis that share among themselves only.
      activation: fused into the transform; see `batch_norm`.
      unbiased: unbiased running variance. False suits users of other libraries'
        statistics; at small batches, inference then differs from training.
      single_value: see `batch_norm`.
      skip_nonfinite: see `batch_norm`.

    Returns:
      y, of x's shape and dtype, and the new statistics in the old ones' dtype.

    Raises:
      TypeError: as `batch_norm`; a limit is not a number.
      ValueError: as `batch_norm`; r_max is below 1, d_max is negative, or either is no
        scalar.
    """
    _check_limit("r_max", r_max, 1)
    _check_limit("d_max", d_max, 0)
    call = check(
        params,
        stats,
        x,
        train=train,
        gathering=(),
        axis=axis,
        decay=decay,
        eps=eps,
        weights=weights,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        activation=activation,
        unbiased=unbiased,
        single_value=single_value,
        skip_nonfinite=skip_nonfinite,
    )
    return train_step(call, (r_max, d_max)) if train else (infer(call), stats)


def _check_limit(name: str, limit: ArrayLike, least: float) -> None:
    """A limit is a scalar, and at least so much where it is known when tracing."""
    if np.ndim(limit):
        raise ValueError(f"{name} must be a scalar, got shape {np.shape(limit)}.")
    if isinstance(limit, jax.core.Tracer):
        return
    value = np.asarray(limit)
    if not jnp.issubdtype(value.dtype, jnp.number):
        raise TypeError(
            f"{name} must be a number, got {type(limit).__name__}; pass a float or a "
            "scalar array."
        )
    if not value >= least:
        raise ValueError(
            f"{name} must be at least {least}, got {limit}; r_max=1 with d_max=0 is "
            "plain batch normalisation."
        )
