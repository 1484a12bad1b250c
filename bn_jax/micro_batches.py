"""Batch normalisation of a micro-batch by the moments of the whole batch."""

import functools
from collections.abc import Callable, Hashable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from bn_jax import collectives
from bn_jax.arguments import Call
from bn_jax.collectives import AxisName, Groups
from bn_jax.layout import Layout
from bn_jax.moments import Moments, moments
from bn_jax.params import BatchNormParams
from bn_jax.passes import nonzero
from bn_jax.sharding import divided_like
from bn_jax.statistics import (
    BatchStats,
    MicroBatchStats,
    update_stats,
    without_nonfinite,
)

# In a network's jaxpr, the input of each layer has this name and the layer's number of
# features behind it.
LAYER = "bn_jax_micro_batch_of_features:"


def micro_batch_norm(
    infer: Callable[[Call], jax.Array], call: Call
) -> tuple[jax.Array, MicroBatchStats]:
    """What `bn_jax.batch_norm` does with `MicroBatchStats` in training.

    Args:
      infer: normalises by a call's statistics.
      call: of `batch_norm`.
    """
    options, params, stats, x, weights, decay = call
    x = checkpoint_name(x, f"{LAYER}{stats.mean.size}")
    part = moments(
        x,
        axis=options.feature_axes,
        weights=weights,
        axis_name=options.axis_name,
        axis_index_groups=options.groups,
    )
    whole = _on_every_device(
        options.axis_name,
        options.groups,
        collectives.varying_axes(x),
        Moments(*(field.astype(part.mean.dtype) for field in stats.whole)),
    )
    at = jax.lax.stop_gradient(whole)
    by_whole = call._replace(
        params=_with_gradient(params, whole, at, options.eps),
        stats=BatchStats(at.mean, at.var),
        x=x,
    )
    batch = without_nonfinite(stats.whole) if options.skip_nonfinite else stats.whole
    old = BatchStats(stats.mean, stats.var)
    moved = update_stats(old, batch, decay=decay, unbiased=options.unbiased)
    influence = _influence(call.layout, x, weights, at)
    new = MicroBatchStats(*moved, stats.whole, part, influence)

    def as_before(leaf: jax.Array, like: jax.Array) -> jax.Array:
        return divided_like(leaf.astype(like.dtype), like)

    return infer(by_whole), jax.tree.map(as_before, new, stats)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _on_every_device(
    axis_name: AxisName | None,
    groups: Groups | None,
    varying: frozenset[Hashable],
    whole: Moments,
) -> Moments:
    """The same moments, whose gradient is the sum over the devices that share them."""
    return Moments(*(collectives.vary_over(field, varying) for field in whole))


def _on_every_device_forward(
    axis_name: AxisName | None,
    groups: Groups | None,
    varying: frozenset[Hashable],
    whole: Moments,
) -> tuple[Moments, Moments]:
    return _on_every_device(axis_name, groups, varying, whole), whole


def _on_every_device_backward(
    axis_name: AxisName | None,
    groups: Groups | None,
    varying: frozenset[Hashable],
    whole: Moments,
    cotangent: Moments,
) -> tuple[Moments]:
    parts = jnp.stack([cotangent.mean, cotangent.var])
    mean, var = collectives.group_sum(parts, axis_name, groups)
    total = Moments(jnp.zeros_like(whole.count), mean, var)
    return (Moments(*map(collectives.match_varying, total, whole)),)


_on_every_device.defvjp(_on_every_device_forward, _on_every_device_backward)


def _with_gradient(
    params: BatchNormParams, moments: Moments, at: Moments, eps: float
) -> BatchNormParams:
    """Parameters through which the gradient reaches the moments.

    Normalising by `at`, which is constant, and then by these is normalising by
    `moments`, in value (where the two are equal) and in first derivatives: y =
    scale * xhat + bias has dy/dvar = -scale * xhat / (2 (var + eps)) and
    dy/dmean = -scale / sqrt(var + eps).
    """
    scale = jnp.ones_like(at.var) if params.scale is None else params.scale
    bias = jnp.zeros_like(at.var) if params.bias is None else params.bias
    scale, bias = (param.astype(at.var.dtype) for param in (scale, bias))
    relative_var = (moments.var - at.var) / (at.var + eps)
    shift = (moments.mean - at.mean) * jax.lax.rsqrt(at.var + eps)
    return BatchNormParams(scale * (1 - relative_var / 2), bias - scale * shift)


def _influence(
    layout: Layout, x: jax.Array, weights: jax.Array | None, at: Moments
) -> Moments:
    """What has the derivatives of the whole batch's moments by one micro-batch.

    d mean = d sum(w (x - mean)) / m and d var = d sum(w ((x - mean)^2 - var)) / m, with
    mean, var and m held constant, since sum(w (x - mean)) is 0 over the whole batch.
    """
    deviation = x.astype(at.mean.dtype) - layout.expand(at.mean)
    if weights is not None:
        deviation = jnp.where(weights == 0, 0, deviation)
    values = Moments(
        jnp.zeros_like(deviation),
        deviation,
        jnp.square(deviation) - layout.expand(at.var),
    )
    if weights is not None:
        values = Moments(*(weights * value for value in values))
    m = nonzero(at.count)
    return Moments(*(value.sum(layout.position_axes) / m for value in values))
