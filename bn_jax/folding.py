"""Batch normalisation at inference as an affine map (section 3.1, Algorithm 2)."""

import jax

from bn_jax import arguments
from bn_jax.moments import statistics_dtype
from bn_jax.params import BatchNormParams
from bn_jax.statistics import BatchStats


def inference_affine(
    params: BatchNormParams, stats: BatchStats, *, eps: float = 1e-3
) -> tuple[jax.Array, jax.Array]:
    """The map y = scale * x + shift that inference applies (Algorithm 2, line 11).

    Args:
      params: scale and bias, (features) each; a missing one counts as 1 or 0.
      stats: population statistics, (features) each.
      eps: added to the variance; what training used.

    Returns:
      scale = params.scale / sqrt(var + eps) and shift = params.bias - mean * scale,
      (features) each, float32 (float64 if the statistics are).

    Raises:
      TypeError: eps is not a number, or params or stats are not of the right type.
      ValueError: eps is not positive, stats are missing, or shapes differ.
    """
    arguments.check_eps(eps)
    arguments.check_types(params, stats)
    arguments.check_features(params, stats, stats.var.shape, "stats.var")
    dtype = statistics_dtype(stats.var)
    mean, var = (field.astype(dtype) for field in stats)
    scale = jax.lax.rsqrt(var + eps)
    if params.scale is not None:
        scale = scale * params.scale.astype(dtype)
    shift = -mean * scale
    if params.bias is not None:
        shift = shift + params.bias.astype(dtype)
    return scale, shift
