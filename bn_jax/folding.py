"""Batch normalisation at inference as an affine map, and folded into a layer.

Section 3.1 and Algorithm 2 of the paper: with fixed statistics the transform is
y = scale * x + shift, and so a part of the linear layer that x comes from.
"""

import jax
import jax.numpy as jnp

from bn_jax import arguments
from bn_jax.params import BatchNormParams
from bn_jax.passes import statistics_dtype
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


def fold_dense(
    kernel: jax.Array,
    bias: jax.Array | None,
    params: BatchNormParams,
    stats: BatchStats,
    *,
    eps: float = 1e-3,
) -> tuple[jax.Array, jax.Array]:
    """A dense layer that computes what it and the normalisation after it compute.

    Args:
      kernel: (inputs, features), as Flax has it.
      bias: (features), or None for a layer without one.
      params: the normalisation's scale and bias, (features) each, or None for either.
      stats: population statistics, (features) each.
      eps: added to the variance; what training used.

    Returns:
      kernel * scale and bias * scale + shift, for `inference_affine`'s scale and shift,
      in the dtype of the kernel.

    Raises:
      TypeError: as `inference_affine`, or the kernel is not floating point.
      ValueError: as `inference_affine`, or shapes do not fit.
    """
    kernel = jnp.asarray(kernel)
    _check_rank(kernel, kernel.ndim == 2, "(inputs, features)")
    return _fold(kernel, bias, params, stats, eps)


def fold_conv(
    kernel: jax.Array,
    bias: jax.Array | None,
    params: BatchNormParams,
    stats: BatchStats,
    *,
    eps: float = 1e-3,
) -> tuple[jax.Array, jax.Array]:
    """A convolution that computes what it and the normalisation after it compute.

    Args:
      kernel: (positions..., inputs of a group, features), as Flax has it: HWIO for
        images. Grouped and depthwise convolutions are no exception: every feature has
        one column of the kernel, whatever inputs it reads.
      bias: (features), or None for a layer without one.
      params: the normalisation's scale and bias, (features) each, or None for either.
      stats: population statistics, (features) each.
      eps: added to the variance; what training used.

    Returns:
      kernel * scale and bias * scale + shift, for `inference_affine`'s scale and shift,
      in the dtype of the kernel. Exact under any padding with zeros, since the shift
      is added after it.

    Raises:
      TypeError: as `inference_affine`, or the kernel is not floating point.
      ValueError: as `inference_affine`, or shapes do not fit.
    """
    kernel = jnp.asarray(kernel)
    expected = "(positions..., inputs of a group, features)"
    _check_rank(kernel, kernel.ndim >= 3, expected)
    return _fold(kernel, bias, params, stats, eps)


def _check_rank(kernel: jax.Array, fits: bool, expected: str) -> None:
    if not fits:
        raise ValueError(
            f"kernel has shape {kernel.shape}, expected {expected}; fold_dense takes "
            "dense layers and fold_conv convolutions."
        )


def _fold(
    kernel: jax.Array,
    bias: jax.Array | None,
    params: BatchNormParams,
    stats: BatchStats,
    eps: float,
) -> tuple[jax.Array, jax.Array]:
    scale, shift = inference_affine(params, stats, eps=eps)
    features = kernel.shape[-1:]
    shapes = {"the normalisation": scale.shape}
    if bias is not None:
        shapes["bias"] = jnp.shape(bias)
    for name, shape in shapes.items():
        if shape != features:
            raise ValueError(
                f"{name} has features of shape {shape}, but kernel of shape "
                f"{kernel.shape} has {features}; only one value per feature of the "
                "layer folds into it."
            )
    dtype = jnp.promote_types(statistics_dtype(kernel), scale.dtype)
    scale, shift = scale.astype(dtype), shift.astype(dtype)
    if bias is not None:
        shift = shift + jnp.asarray(bias).astype(dtype) * scale
    columns = jnp.expand_dims(scale, range(kernel.ndim - 1))
    folded = kernel.astype(dtype) * columns
    return folded.astype(kernel.dtype), shift.astype(kernel.dtype)
