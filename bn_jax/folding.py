"""Batch normalisation at inference as an affine map, and folded into a layer.

Section 3.1 and Algorithm 2 of the paper: with fixed statistics the transform is
y = scale * x + shift, and so a part of the linear layer that x comes from, or of the
one that y goes into.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from bn_jax import arguments
from bn_jax.params import BatchNormParams
from bn_jax.passes import statistics_dtype
from bn_jax.statistics import BatchStats


def inference_affine(
    params: BatchNormParams, stats: BatchStats, *, eps: float
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
    kernel: ArrayLike,
    bias: ArrayLike | None,
    params: BatchNormParams,
    stats: BatchStats,
    *,
    eps: float,
    norm_first: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """A dense layer that computes what it and the normalisation next to it compute.

    Args:
      kernel: (inputs, features), as Flax has it.
      bias: (features), or None for a layer without one.
      params: the normalisation's scale and bias, (features) each, or None for either.
      stats: population statistics, (features) each.
      eps: added to the variance; what training used.
      norm_first: the normalisation is of the layer's inputs rather than its features;
        params and stats are (inputs) each.

    Returns:
      For `inference_affine`'s scale and shift, kernel * scale and bias * scale + shift;
      with norm_first, scale[:, None] * kernel and bias + shift @ kernel. Both in the
      dtype of the kernel.

    Raises:
      TypeError: as `inference_affine`, or the kernel is not floating point.
      ValueError: as `inference_affine`, or shapes do not fit.
    """
    if jnp.ndim(kernel) != 2:
        raise ValueError(
            f"kernel has shape {jnp.shape(kernel)}, expected (inputs, features); "
            "fold_conv takes convolutions."
        )
    inputs = 0 if norm_first else None
    return fold_axes(kernel, bias, params, stats, eps=eps, inputs=inputs, outputs=1)


def fold_conv(
    kernel: ArrayLike,
    bias: ArrayLike | None,
    params: BatchNormParams,
    stats: BatchStats,
    *,
    eps: float,
    norm_first: bool = False,
    transpose_kernel: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """A convolution that computes what it and the normalisation next to it compute.

    Args:
      kernel: (positions..., inputs of a group, features), as Flax has it: HWIO for
        images. Grouped, depthwise and transposed convolutions are no exception: every
        feature has one column of the kernel, whatever inputs it reads.
      bias: (features), or None for a layer without one.
      params: the normalisation's scale and bias, (features) each, or None for either.
      stats: population statistics, (features) each.
      eps: added to the variance; what training used.
      norm_first: the normalisation is of the layer's inputs rather than its features;
        params and stats are (inputs of all groups) each. Exact only where the
        convolution pads nothing: it pads with zeros that are not normalised.
      transpose_kernel: the kernel is (positions..., features, inputs), as of Flax's
        transposed convolutions with this argument.

    Returns:
      For `inference_affine`'s scale and shift, kernel * scale and bias * scale + shift,
      exact under any padding, since the shift is added after it; with norm_first, the
      kernel times the scale of each of its inputs, and the bias plus the sum of the
      kernel times their shift. Both in the dtype of the kernel.

    Raises:
      TypeError: as `inference_affine`, or the kernel is not floating point.
      ValueError: as `inference_affine`, or shapes do not fit.
    """
    rank = jnp.ndim(kernel)
    if rank < 3:
        raise ValueError(
            f"kernel has shape {jnp.shape(kernel)}, expected (positions..., inputs of "
            "a group, features); fold_dense takes dense layers."
        )
    axes = (rank - 1, rank - 2) if transpose_kernel else (rank - 2, rank - 1)
    inputs, outputs = axes if norm_first else (None, axes[1])
    return fold_axes(
        kernel, bias, params, stats, eps=eps, inputs=inputs, outputs=outputs
    )


def fold_axes(
    kernel: ArrayLike,
    bias: ArrayLike | None,
    params: BatchNormParams,
    stats: BatchStats,
    *,
    eps: float,
    inputs: int | None,
    outputs: int,
) -> tuple[jax.Array, jax.Array]:
    """Folds a normalisation into a layer, by the axes of the layer's kernel.

    Args:
      kernel: of any rank; 2 for dense layers.
      bias: (features), or None.
      params: of the normalisation.
      stats: of the normalisation.
      eps: of the normalisation.
      inputs: the kernel's axis of the inputs of a group, for a normalisation before the
        layer; None for one after it.
      outputs: the kernel's axis of features.

    Returns:
      A kernel and a bias.
    """
    scale, shift = inference_affine(params, stats, eps=eps)
    kernel = jnp.asarray(kernel)
    features = expected = kernel.shape[outputs]
    if inputs is not None:
        size = kernel.shape[inputs]
        groups = scale.size // size if kernel.ndim > 2 else 1
        expected = groups * size
        if groups and features % groups:
            raise ValueError(
                f"kernel of shape {kernel.shape} has {features} features, which "
                f"{groups} groups of the normalisation's {scale.size} cannot share."
            )
    checks = {"the normalisation": (scale, expected), "bias": (bias, features)}
    for name, (array, length) in checks.items():
        if array is not None and jnp.shape(array) != (length,):
            raise ValueError(
                f"{name} has features of shape {jnp.shape(array)}, but kernel of shape "
                f"{kernel.shape} has {(length,)}; only one value per feature folds."
            )
    dtype = jnp.promote_types(statistics_dtype(kernel), scale.dtype)
    bias = jnp.zeros(features, dtype) if bias is None else jnp.asarray(bias, dtype)
    wide, scale, shift = (array.astype(dtype) for array in (kernel, scale, shift))
    others = [axis for axis in range(kernel.ndim) if axis != outputs]
    if inputs is None:
        bias = bias * scale + shift
        wide = wide * jnp.expand_dims(scale, others)
    else:
        rest = [axis for axis in others if axis != inputs]

        def spread(per_input: jax.Array) -> jax.Array:
            """What each feature meets: each group of inputs has its run of features."""
            table = per_input.reshape(groups, size)
            table = jnp.repeat(table, features // groups, axis=0)
            return jnp.expand_dims(table.T if inputs < outputs else table, rest)

        bias = bias + (wide * spread(shift)).sum(others)
        wide = wide * spread(scale)
    return wide.astype(kernel.dtype), bias.astype(kernel.dtype)
