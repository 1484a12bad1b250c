"""Batch normalisation: Algorithm 1 with its gradient, and Algorithm 2's inference.

From the call to the gradient; `passes.py` has the passes over memory.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike

from bn_jax import collectives, forms, passes, population
from bn_jax.activations import ActivationName, activation_of
from bn_jax.arguments import Call, Options, check
from bn_jax.collectives import AxisIndexGroups, AxisName
from bn_jax.forms import Form
from bn_jax.layout import make_layout
from bn_jax.micro_batches import micro_batch_norm
from bn_jax.moments import Moments, shared_moments
from bn_jax.params import BatchNormParams
from bn_jax.sharding import compiled, specs_of
from bn_jax.statistics import (
    BatchStats,
    MicroBatchStats,
    PopulationMoments,
    Statistics,
    update_stats,
    without_nonfinite,
)

# The name that policies of `jax.checkpoint` know the batch's moments by. Saving them
# spares rematerialisation the reductions, and the collective of shared moments.
MOMENTS_NAME = "batch_norm_moments"

# r_max and d_max of batch renormalisation.
Limits = tuple[ArrayLike, ArrayLike]


def batch_norm(
    params: BatchNormParams,
    stats: Statistics,
    x: ArrayLike,
    *,
    train: bool,
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
      axis_name: mapped axis or axes to share moments over: one collective forward (two
        among more than 8 devices), one backward.
      axis_index_groups: groups of indices along axis_name that share moments among
        themselves only.
      activation: applied to the result: None, or "relu", "relu6", "leaky_relu" (slope
        0.01), "silu" or "gelu" (as `jax.nn.gelu` has it). Nothing is kept for its
        gradient.
      unbiased: the running variance takes the batch's variance times m / (m - 1), m
        counted over devices and positions (Algorithm 2). False gives Flax's.
      single_value: what training does on one value per feature, which is its own mean:
        "error", or the "bias" for y whatever x is, as Flax does.
      skip_nonfinite: leave the statistics as they are after a batch with values that
        are not finite, as loss scaling leaves the parameters. Finite values always
        give finite moments.

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
    call = check(
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
        skip_nonfinite=skip_nonfinite,
        single_value=single_value,
    )
    if not train:
        return infer(call), stats
    if isinstance(stats, MicroBatchStats):
        return micro_batch_norm(infer, call)
    return train_step(call)


def infer(call: Call) -> jax.Array:
    """Normalises by the statistics (Algorithm 2)."""
    options, params, stats, x, weights, _ = call
    by = BatchStats(stats.mean, stats.var)
    y: jax.Array = _infer(options, params, by, x, weights)
    return y


def train_step(call: Call, limits: Limits | None = None) -> tuple[jax.Array, Any]:
    """Normalises by the batch, and moves the statistics.

    Args:
      call: what was checked.
      limits: r_max and d_max of batch renormalisation, or None for none of it.
    """
    options, params, stats, x, weights, decay = call
    result: tuple[jax.Array, Any] = _train_step(
        options, params, stats, x, weights, decay, limits
    )
    return result


def _like_x(options: Options, params: Any, stats: Any, x: jax.Array, *_: Any) -> Any:
    return specs_of(x)


def _like_x_and_stats(
    options: Options, params: Any, stats: Any, x: jax.Array, *_: Any
) -> Any:
    return specs_of((x, stats))


@compiled(_like_x)
def _infer(
    options: Options,
    params: BatchNormParams,
    stats: BatchStats,
    x: jax.Array,
    weights: jax.Array | None,
) -> jax.Array:
    # Recomputing is one pass over x; without it, reverse mode would keep x and more in
    # float32.
    @jax.checkpoint
    def by_statistics(
        params: BatchNormParams, x: jax.Array, weights: jax.Array | None
    ) -> jax.Array:
        dtype = passes.statistics_dtype(x)
        mean, var = (field.astype(dtype) for field in jax.lax.stop_gradient(stats))
        if weights is not None:
            x = jnp.where(weights == 0, 0, x)
        inverse_std = jax.lax.rsqrt(var + options.eps)
        scale, bias = _in_dtype(params, mean)
        return _normalise(options, x, weights, mean, inverse_std * scale, bias)

    return by_statistics(params, x, weights)


@compiled(_like_x_and_stats)
def _train_step(
    options: Options,
    params: BatchNormParams,
    stats: BatchStats | PopulationMoments,
    x: jax.Array,
    weights: jax.Array | None,
    decay: jax.Array,
    limits: Limits | None,
) -> tuple[jax.Array, BatchStats | PopulationMoments]:
    old = BatchStats(stats.mean, stats.var)
    y, batch = normalise_by_batch(options, params, x, weights, old, limits)
    if options.skip_nonfinite:
        batch = without_nonfinite(batch)
    if isinstance(stats, PopulationMoments):
        return y, population.update(stats, batch)
    return y, update_stats(stats, batch, decay=decay, unbiased=options.unbiased)


class Correction(NamedTuple):
    """What batch renormalisation makes of xhat: r * xhat + d; (features) each."""

    r: jax.Array
    d: jax.Array


def correction_towards(
    stats: BatchStats, batch: Moments, eps: float, limits: Limits
) -> Correction:
    """The correction by `bn_jax.batch_renorm`, constant to the gradient."""
    dtype = batch.mean.dtype
    mean, var = (field.astype(dtype) for field in stats)
    r_max, d_max = (jnp.asarray(limit).astype(dtype) for limit in limits)
    std = jnp.sqrt(var + eps)
    r = jnp.clip(jnp.sqrt(batch.var + eps) / std, 1 / r_max, r_max)
    d = jnp.clip((batch.mean - mean) / std, -d_max, d_max)
    return Correction(r, d)


class _Residuals(NamedTuple):
    """What the gradient keeps; all but x and its weights are (features)."""

    params: BatchNormParams
    x: jax.Array  # in its own dtype
    weights: jax.Array | None
    m: jax.Array  # the total weight, over all devices that share moments
    mean: jax.Array
    inverse_std: jax.Array  # 1 / sqrt(var + eps)
    correction: Correction | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def normalise_by_batch(
    options: Options,
    params: BatchNormParams,
    x: jax.Array,
    weights: jax.Array | None,
    stats: BatchStats,
    limits: Limits | None,
) -> tuple[jax.Array, Moments]:
    """Algorithm 1: the batch normalising transform, y = scale * xhat + bias.

    Args:
      options: of the call.
      params: scale and bias.
      x: the input.
      weights: in the dtype of the statistics, or None.
      stats: what renormalisation corrects towards, and the mean that is expected. No
        gradient flows into them.
      limits: r_max and d_max; with them y = scale * (r * xhat + d) + bias, where r
        and d are constant to the gradient.

    Returns:
      y, and the moments of the batch, which are for the statistics alone: cotangents of
      theirs are dropped.
    """
    return _forward(options, params, x, weights, stats, limits)[0]


def _forward(
    options: Options,
    params: BatchNormParams,
    x: jax.Array,
    weights: jax.Array | None,
    stats: BatchStats,
    limits: Limits | None,
) -> tuple[tuple[jax.Array, Moments], _Residuals]:
    layout = make_layout(x.shape, options.feature_axes)
    batch = shared_moments(
        layout, x, weights, options.axis_name, options.groups, stats.mean
    )
    batch = Moments(*(checkpoint_name(field, MOMENTS_NAME) for field in batch))
    m, mean, var = batch
    inverse_std = passes.inverse_std(var, options.eps)
    scale, bias = _in_dtype(params, mean)
    correction = None
    if limits is not None:
        correction = correction_towards(stats, batch, options.eps, limits)
        r, d = correction
        scale, bias = r * scale, d * scale + bias
    y = _normalise(options, x, weights, mean, inverse_std * scale, bias)
    residuals = _Residuals(params, x, weights, m, mean, inverse_std, correction)
    return (y, batch), residuals


def _backward(
    options: Options,
    residuals: _Residuals,
    cotangents: tuple[jax.Array, Moments],
) -> tuple[BatchNormParams, jax.Array, jax.Array | None, None, None]:
    """Section 3's gradients, with the sums over the batch gathered first.

    With g the cotangent of z = scale * xhat + bias, where dy has gone through the
    activation, w the weights and m their sum, b = sum(g) and s = sum(g * xhat):

      dbias = b,  dscale = s,  dx = scale / std * (g - w * (b + xhat * s) / m)
      dw = -scale * (b * xhat + s * (xhat^2 - var / (var + eps)) / 2) / m

    Devices that share moments may hold different scales: in dx and dw, scale * b and
    scale * s are sums over the devices of each one's product.

    Renormalisation's z = scale * (r * xhat + d) + bias is that with the scale
    r * scale, but for dscale = r * s + d * b.
    """
    params, x, weights, m, mean, inverse_std, correction = residuals
    dy, _ = cotangents
    layout = make_layout(x.shape, options.feature_axes)
    activation = activation_of(options.activation)
    scale, bias = _in_dtype(params, mean)
    if correction is not None:
        r, d = correction
        scale, bias = r * scale, d * scale + bias

    def sums_pass(form: Form, *operands: Any) -> Any:
        return passes.gradient_sums_pass(form, layout, activation, *operands)

    b, product, table = forms.run(
        sums_pass, x, dy, weights, mean, inverse_std * scale, bias
    )
    s = jnp.where(inverse_std == 0, 0, inverse_std * product)
    # Devices may hold different scales, so what flows through the moments they share is
    # scaled before it is summed. The unscaled sums come along for parameters that are
    # one for all devices, whose gradients would need a collective of their own.
    total_scaled_b, total_scaled_s, total_b, total_s = collectives.group_sum(
        jnp.stack([scale * b, scale * s, b, s]), options.axis_name, options.groups
    )
    m = passes.nonzero(m)
    b_share, s_share = total_scaled_b / m, total_scaled_s / m

    def dx_pass(form: Form, *operands: Any) -> jax.Array:
        return passes.input_gradient_pass(form, layout, activation, *operands)

    through_var, through_mean = inverse_std**2 * s_share, inverse_std * b_share
    dx = forms.run(dx_pass, x, dy, weights, table, through_var, through_mean)

    dw = None
    if weights is not None:

        def dw_pass(form: Form, *operands: Any) -> jax.Array:
            return passes.weights_gradient_pass(form, layout, *operands)

        var_share = 1 - options.eps * inverse_std**2  # var / (var + eps)
        dw = forms.run(
            dw_pass, x, weights, mean, inverse_std, var_share, b_share, s_share
        )
        dw = collectives.match_varying(dw, weights)

    dscale, total_dscale = s, total_s
    if correction is not None:
        dscale, total_dscale = r * s + d * b, r * total_s + d * total_b
    summed_axes = collectives.summed_axes(options.axis_name, options.groups)

    def matching(
        param: jax.Array | None, own: jax.Array, total: jax.Array
    ) -> jax.Array | None:
        if param is None:
            return None
        cotangent = collectives.match_varying(own, param, total, summed_axes)
        return cotangent.astype(param.dtype)

    dparams = BatchNormParams(
        matching(params.scale, dscale, total_dscale), matching(params.bias, b, total_b)
    )
    return dparams, collectives.match_varying(dx, x), dw, None, None


normalise_by_batch.defvjp(_forward, _backward)


def _normalise(
    options: Options,
    x: jax.Array,
    weights: jax.Array | None,
    mean: jax.Array,
    slope: jax.Array,
    shift: jax.Array,
) -> jax.Array:
    layout = make_layout(x.shape, options.feature_axes)
    activation = activation_of(options.activation)

    def one_pass(form: Form, *operands: Any) -> jax.Array:
        return passes.normalise_pass(form, layout, activation, *operands)

    return forms.run(one_pass, x, weights, mean, slope, shift)


def _in_dtype(params: BatchNormParams, like: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Scale and bias in another array's dtype, 1 and 0 where they are missing."""
    scale = jnp.ones_like(like) if params.scale is None else params.scale
    bias = jnp.zeros_like(like) if params.bias is None else params.bias
    return scale.astype(like.dtype), bias.astype(like.dtype)
