"""The batch normalising transform: Algorithm 1 with its gradient, and inference."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from bn_jax import arguments, collectives, population
from bn_jax.collectives import AxisIndexGroups, AxisName
from bn_jax.fusion import computed_again, computed_once, position_sums
from bn_jax.layout import Layout, make_layout
from bn_jax.micro_batches import micro_batch_norm
from bn_jax.moments import (
    Moments,
    check_weights,
    nonzero_count,
    shared_moments,
    statistics_dtype,
)
from bn_jax.params import BatchNormParams
from bn_jax.statistics import (
    BatchStats,
    MicroBatchStats,
    PopulationMoments,
    Statistics,
    update_stats,
)

# The name that policies of `jax.checkpoint` know the batch's moments by. Saving them
# spares rematerialisation the reductions, and the collective of shared moments.
MOMENTS_NAME = "batch_norm_moments"


def batch_norm(
    params: BatchNormParams,
    stats: Statistics,
    x: jax.Array,
    *,
    train: bool,
    axis: int | Sequence[int] = -1,
    decay: float | jax.Array = 0.99,
    eps: float = 1e-3,
    weights: jax.Array | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: AxisIndexGroups | None = None,
    activation: str | None = None,
    unbiased: bool = True,
) -> tuple[jax.Array, Statistics]:
    """Normalises each feature to mean 0 and variance 1, then scales and shifts it.

    Training (Algorithm 1) normalises by the moments of the batch and moves the
    statistics towards them. Inference (Algorithm 2) normalises by the statistics and
    returns them as they are.

    The gradient of training is written by hand (section 3): it flows through the
    batch's moments, and what is kept for it is x in its own dtype, the parameters, and
    mean, 1/sqrt(var + eps) and count per feature, and the weights if given. No gradient
    flows into or out of the statistics.

    Under `jax.checkpoint` the moments are computed again in the backward pass, unless
    its policy saves the name `MOMENTS_NAME`.

    Reverse mode is the fast path. Forward mode (`jax.jvp`, `jax.jacfwd`) works with
    train=False; with train=True JAX raises a TypeError, as for every function with a
    gradient of its own. Forward over reverse (`jax.jvp` of `jax.grad`, `jax.hessian`)
    works in both.

    Args:
      params: scale and bias, (features) each; None for either leaves it out.
      stats: mean and variance, (features) each, float32 or float64. In training also
        `PopulationMoments`, which gather batches for Algorithm 2 and do not decay, or
        `MicroBatchStats`, see `bn_jax.accumulation`.
        In training y does not depend on them, but on TPU by rounding: the batch's
        moments are taken about the mean that they expect.
      x: any rank; float16, bfloat16, float32 or float64.
      train: normalise by the batch (True) or by the statistics (False).
      axis: the feature axis or axes, every other axis is averaged over: -1 for dense
        layers and for convolutions in NHWC layout (section 3.2), all but the batch's
        axis for one mean and variance per activation.
      decay: the statistics become decay * old + (1 - decay) * batch. May be traced.
      eps: added to the variance.
      weights: 0 for padding, or real-valued example weights >= 0, which say how often
        a value counts in the moments; same rank as x, each size x's or 1. Padding may
        hold anything: it reaches no output, statistic or gradient, and its outputs and
        gradients are 0. Weights that are not 0 get their exact gradient.
      axis_name: mapped axis or axes to share moments over: one collective forward, one
        backward, of 3 values per feature and device.
      axis_index_groups: groups of indices along axis_name that share moments among
        themselves only.
      activation: None, or "relu" applied to the result; no mask is stored for it.
      unbiased: the running variance takes the batch's variance times m / (m - 1), m
        counted over devices and positions (Algorithm 2). False gives Flax's.

    Returns:
      y, of x's shape and dtype, and the new statistics in the old ones' dtype. Where
      no position counts (an empty batch, or all padding), y is 0 and the statistics
      stay.

    Raises:
      TypeError: x, params or stats are not floating point or not of the right type;
        eps or axis is not a number; in training, stats of less than 32 bits.
      ValueError: a value or a shape does not fit (the message says which); stats are
        None; in training, only one value per feature.
    """
    if isinstance(stats, MicroBatchStats):
        return micro_batch_norm(
            batch_norm,
            params,
            stats,
            x,
            train=train,
            axis=axis,
            decay=decay,
            eps=eps,
            weights=weights,
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
            activation=activation,
            unbiased=unbiased,
        )
    arguments.check_eps(eps)
    arguments.check_decay(decay)
    arguments.check_activation(activation)
    x = jnp.asarray(x)
    layout = make_layout(x.shape, axis)
    weights = check_weights(x, weights)
    arguments.check_types(params, stats, gathering=train)
    source = f"x of shape {x.shape} along its feature axes {layout.feature_axes}"
    arguments.check_features(params, stats, layout.feature_shape, source)
    groups = collectives.check_groups(axis_name, axis_index_groups)
    if not train:
        frozen = functools.partial(_normalise_by_statistics, layout, eps, activation)
        # Recomputing is one pass over x; without it, reverse mode would keep x and
        # more in float32.
        return jax.checkpoint(frozen)(params, stats, x, weights), stats
    arguments.check_precision(stats)
    num_devices = collectives.group_size(axis_name, groups)
    arguments.check_num_values(x, layout, num_devices)
    options = _Options(layout, float(eps), activation, axis_name, groups)
    y, batch = _normalise_by_batch(options, params, x, weights, stats.mean)
    if isinstance(stats, PopulationMoments):
        return y, population.update(stats, batch)
    return y, update_stats(stats, batch, decay=decay, unbiased=unbiased)


class _Options(NamedTuple):
    """What the trained transform needs to know before it sees a value."""

    layout: Layout
    eps: float
    activation: str | None
    axis_name: AxisName | None
    groups: tuple[tuple[int, ...], ...] | None


class _Residuals(NamedTuple):
    """What the gradient keeps."""

    params: BatchNormParams
    x: jax.Array  # in its own dtype
    weights: jax.Array | None
    total_weight: jax.Array  # (features), over all devices that share moments
    mean: jax.Array  # (features)
    inverse_std: jax.Array  # (features), 1 / sqrt(var + eps)


def _normalise_by_statistics(
    layout: Layout,
    eps: float,
    activation: str | None,
    params: BatchNormParams,
    stats: BatchStats,
    x: jax.Array,
    weights: jax.Array | None,
) -> jax.Array:
    dtype = statistics_dtype(x)
    mean, var = (field.astype(dtype) for field in jax.lax.stop_gradient(stats))
    inverse_std = jax.lax.rsqrt(var + eps)
    if weights is not None:
        x = jnp.where(weights == 0, 0, x)
    return _normalise(layout, activation, params, x, weights, mean, inverse_std)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _normalise_by_batch(
    options: _Options,
    params: BatchNormParams,
    x: jax.Array,
    weights: jax.Array | None,
    expected_mean: jax.Array,
) -> tuple[jax.Array, Moments]:
    arrays = params, x, weights, expected_mean
    return _normalise_by_batch_forward(options, *arrays)[0]


def _normalise_by_batch_forward(
    options: _Options,
    params: BatchNormParams,
    x: jax.Array,
    weights: jax.Array | None,
    expected_mean: jax.Array,
) -> tuple[tuple[jax.Array, Moments], _Residuals]:
    layout = options.layout
    batch = shared_moments(
        x, layout, weights, options.axis_name, options.groups, expected_mean
    )
    batch = Moments(*(checkpoint_name(field, MOMENTS_NAME) for field in batch))
    mean, inverse_std = batch.mean, jax.lax.rsqrt(batch.var + options.eps)
    y = _normalise(layout, options.activation, params, x, weights, mean, inverse_std)
    residuals = _Residuals(params, x, weights, batch.count, mean, inverse_std)
    return (y, batch), residuals


def _normalise_by_batch_backward(
    options: _Options,
    residuals: _Residuals,
    cotangents: tuple[jax.Array, Moments],
) -> tuple[BatchNormParams, jax.Array, jax.Array | None, None]:
    """Section 3's gradients, with the sums over the batch gathered first.

    With xhat the normalised values, g the output's cotangent where the activation
    passes it, w the weights, m their sum, b = sum(g) and s = sum(g * xhat):

      dbias = b,  dscale = s,  dx = scale / std * (g - w * (b + xhat * s) / m)
      dw = -scale * (b * xhat + s * (xhat^2 - var / (var + eps)) / 2) / m

    Devices that share moments may hold different scales: in dx and dw, scale * b and
    scale * s are sums over the devices of each one's product. The moments' own
    cotangents are dropped: they only feed the statistics.
    """
    params, x, weights, total_weight, mean, inverse_std = residuals
    layout = options.layout
    scale, bias = _filled(params, mean)
    grad = cotangents[0].astype(mean.dtype)

    def centred_and_passes(
        mean: jax.Array, slope: jax.Array, bias: jax.Array
    ) -> tuple[jax.Array, jax.Array | None]:
        """The deviations from the mean, and where the output passes its cotangent."""
        centred = _centre(layout, x, mean)
        passes = None if weights is None else weights != 0
        if passes is not None:
            centred = jnp.where(passes, centred, 0)
        if options.activation == "relu":
            # That y > 0: the less a mask costs, the more loops XLA computes it in.
            positive = centred * layout.expand(slope) > -layout.expand(bias)
            passes = positive if passes is None else passes & positive
        return centred, passes

    # Each sum, and dx, computes what it needs again, so that no mask is stored.
    per_feature = computed_once(mean, inverse_std * scale, bias)
    first = computed_again(*per_feature)
    _, passes = centred_and_passes(*first)
    passing = grad if passes is None else jnp.where(passes, grad, 0)
    second = computed_again(*first)
    centred, passes = centred_and_passes(*second)
    passing_again = grad if passes is None else jnp.where(passes, grad, 0)
    grad_sum, product_sum = position_sums(layout, passing, passing_again * centred)
    sums = jnp.stack([grad_sum, product_sum * inverse_std])
    # Devices may hold different scales, so what flows through the moments they share is
    # scaled before it is summed. The unscaled sums come along for parameters that are
    # one for all devices, whose gradients would need a collective of their own.
    totals = collectives.group_sum(
        jnp.concatenate([scale[None] * sums, sums]), options.axis_name, options.groups
    )
    m = nonzero_count(total_weight)
    scaled_grad_mean, scaled_product_mean = totals[0] / m, totals[1] / m
    moments_slope, moments_shift = computed_once(
        jnp.square(inverse_std) * scaled_product_mean, inverse_std * scaled_grad_mean
    )
    third = computed_again(*second)
    centred, passes = centred_and_passes(*third)
    slope = third[1]
    through_moments = _scale_and_shift(layout, centred, moments_slope, moments_shift)
    if weights is not None:
        through_moments = weights * through_moments
    grad_x = layout.expand(slope) * grad - through_moments
    if passes is not None:
        # Rather than `passing` above: XLA's CPU back end would load the gradient under
        # a mask, and this pass would take a third longer in float32.
        grad_x = jnp.where(passes, grad_x, -through_moments)

    grad_weights = None
    if weights is not None:
        normalised = layout.expand(inverse_std) * centred
        var_share = layout.expand(1 - options.eps * jnp.square(inverse_std))
        per_value = (
            layout.expand(scaled_grad_mean) * normalised
            + layout.expand(scaled_product_mean)
            * (jnp.square(normalised) - var_share)
            / 2
        )
        grad_weights = jnp.where(weights == 0, 0, -per_value)
        shared_axes = [i for i, size in enumerate(weights.shape) if size == 1]
        grad_weights = jnp.sum(grad_weights, axis=shared_axes, keepdims=True)
        grad_weights = collectives.match_varying(grad_weights, weights)

    summed_axes = collectives.summed_axes(options.axis_name, options.groups)

    def grad_param(row: int, param: jax.Array | None) -> jax.Array | None:
        if param is None:
            return None
        total = totals[2 + row]
        matching = collectives.match_varying(sums[row], param, total, summed_axes)
        return matching.astype(param.dtype)

    return (
        BatchNormParams(
            scale=grad_param(1, params.scale), bias=grad_param(0, params.bias)
        ),
        collectives.match_varying(grad_x.astype(x.dtype), x),
        grad_weights,
        None,
    )


_normalise_by_batch.defvjp(_normalise_by_batch_forward, _normalise_by_batch_backward)


def _normalise(
    layout: Layout,
    activation: str | None,
    params: BatchNormParams,
    x: jax.Array,
    weights: jax.Array | None,
    mean: jax.Array,
    inverse_std: jax.Array,
) -> jax.Array:
    scale, bias = _filled(params, mean)
    mean, slope, bias = computed_once(mean, inverse_std * scale, bias)
    centred = _centre(layout, x, mean)
    y = _scale_and_shift(layout, centred, slope, bias)
    if activation == "relu":
        y = jnp.maximum(y, 0)
    if weights is not None:
        y = jnp.where(weights == 0, 0, y)
    return y.astype(x.dtype)


def _filled(params: BatchNormParams, like: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Scale and bias in another array's dtype, 1 and 0 where they are missing."""
    scale = jnp.ones_like(like) if params.scale is None else params.scale
    bias = jnp.zeros_like(like) if params.bias is None else params.bias
    return scale.astype(like.dtype), bias.astype(like.dtype)


def _centre(layout: Layout, x: jax.Array, mean: jax.Array) -> jax.Array:
    # Before anything is scaled: x * inverse_std alone rounds away the difference from
    # the mean when the mean is large.
    return x.astype(mean.dtype) - layout.expand(mean)


def _scale_and_shift(
    layout: Layout, values: jax.Array, scale: jax.Array, shift: jax.Array
) -> jax.Array:
    return values * layout.expand(scale) + layout.expand(shift)
