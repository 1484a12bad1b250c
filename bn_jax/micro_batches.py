"""Gradient accumulation over micro-batches, with the moments of the whole batch."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bn_jax import arguments, collectives
from bn_jax.batch_norm import batch_norm
from bn_jax.collectives import AxisIndexGroups, AxisName
from bn_jax.layout import make_layout
from bn_jax.moments import Moments, check_weights, merge_moments, moments
from bn_jax.params import BatchNormParams
from bn_jax.passes import nonzero
from bn_jax.statistics import BatchStats, update_stats

# Called with a stand-in for batch_norm, params, stats and one micro-batch; returns the
# micro-batch's part of the loss, and the new stats.
LossFunction = Callable[[Callable[..., Any], Any, Any, Any], tuple[jax.Array, Any]]


def accumulate_gradients(
    loss_function: LossFunction, params: Any, stats: Any, micro_batches: Any
) -> tuple[tuple[jax.Array, Any], Any]:
    """Loss and gradients of a large batch, in the memory of one micro-batch.

    Every normalisation uses the moments of all micro-batches together, and the
    gradient flows through them: the result is that of the large batch, up to rounding.
    Of the activations, no more than one micro-batch's is held at a time.

    That costs time. A layer's moments are known only when all micro-batches have gone
    through the layers before it, and the gradient's part that flows through them only
    when it has come back through the layers after it. So with K normalisations the
    micro-batches run K times forward up to each of them, K times forward and back down
    to each of them, and once forward and back as usual: about 1 + 2K / 3 times the
    multiplications of the large batch, and compilation grows with K squared. It is for
    networks of a few layers. For deep ones rather share moments over devices, compute
    activations again with `jax.checkpoint`, or let each micro-batch be a batch of its
    own (`ghost_batch_norm`); docs/small_batches.md compares them.

    The mathematics: with M_k the moments of layer k and T_k those of one micro-batch,
    dL/dM_k = sum over micro-batches of d(loss + sum_{j>k} <dL/dM_j, T_j>)/dM_k, from
    the last layer to the first; then dL/dparams likewise with all layers in the sum.

    Args:
      loss_function: called as `loss_function(batch_norm, params, stats, micro_batch)`;
        returns the micro-batch's part of the loss, a scalar (parts are added, so divide
        by the number of examples of the large batch), and the new statistics. It calls
        the `batch_norm` that it is given, which takes what `bn_jax.batch_norm` takes
        and trains unless told train=False; the same number of times for each
        micro-batch, and not from within `jax.jit`, `jax.checkpoint`, `jax.lax.scan` or
        another transformation inside of it.
      params: what to differentiate by; any tree of floating-point arrays.
      stats: passed on; any tree.
      micro_batches: a tree of arrays whose leading axis is that of the micro-batches.

    Returns:
      ((loss, new statistics), gradients), as `jax.value_and_grad` with has_aux=True
      would of the large batch. Under `jax.pmap` or `jax.shard_map`, with axis_name
      given to `batch_norm`, loss and gradients are the device's part, as there.

    Raises:
      ValueError: no micro-batches, leading axes that differ, or `batch_norm` is never
        called; or as `batch_norm` raises.
      TypeError: as `batch_norm` raises.
    """
    number = _number_of_micro_batches(micro_batches)

    def run(
        params: Any, known: Sequence[Moments], micro_batch: Any
    ) -> tuple[jax.Array, Any, list[_Call]]:
        stand_in = _StandIn(known, number)
        loss, new_stats = loss_function(stand_in, params, stats, micro_batch)
        return loss, new_stats, stand_in.calls

    sharing = _how_calls_share(run, params, micro_batches)

    own_parts: list[Moments] = []
    known: list[Moments] = []
    for k, (axis_name, groups) in enumerate(sharing):

        def own_moments(
            micro_batch: Any, k: int = k, known: Sequence[Moments] = tuple(known)
        ) -> Moments:
            return run(params, known, micro_batch)[2][k].own

        own_parts.append(jax.lax.map(own_moments, micro_batches))
        known.append(_merge(own_parts[k], axis_name, groups))

    # What the loss gains per unit of each layer's mean and variance.
    through: list[Moments | None] = [None] * len(known)

    def with_later_layers(
        params: Any, known: Sequence[Moments], micro_batch: Any
    ) -> Any:
        loss, new_stats, calls = run(params, known, micro_batch)
        surrogate = loss
        for call, gain in zip(calls, through, strict=True):
            if gain is not None:
                surrogate += jnp.sum(gain.mean * call.influence.mean)
                surrogate += jnp.sum(gain.var * call.influence.var)
        return surrogate, (loss, new_stats)

    for k, (axis_name, groups) in reversed(list(enumerate(sharing))):

        def gain(micro_batch: Any, k: int = k) -> Moments:
            def of_layer(moments: Moments) -> Any:
                replaced = [*known[:k], moments, *known[k + 1 :]]
                return with_later_layers(params, replaced, micro_batch)[0]

            # Whole moments are the same on all devices, but the gain is this device's
            # part: `jax.shard_map` would otherwise sum it, and we would again.
            here = map(collectives.match_varying, known[k], own_parts[k])
            return jax.grad(of_layer)(Moments(*here))

        gains = jax.lax.map(gain, micro_batches)
        through[k] = Moments(
            *(collectives.group_sum(g.sum(0), axis_name, groups) for g in gains)
        )

    def add(grads: Any, micro_batch: Any) -> tuple[Any, Any]:
        differentiate = jax.grad(with_later_layers, has_aux=True)
        more, loss_and_stats = differentiate(params, known, micro_batch)
        return jax.tree.map(jnp.add, grads, more), loss_and_stats

    nothing = jax.tree.map(
        lambda leaf: collectives.match_varying(jnp.zeros_like(leaf), leaf), params
    )
    grads, (losses, new_stats) = jax.lax.scan(add, nothing, micro_batches)
    # Each micro-batch has moved the old statistics by the same moments.
    return (losses.sum(0), jax.tree.map(lambda leaf: leaf[-1], new_stats)), grads


class _Call(NamedTuple):
    """What one normalisation of one micro-batch has to say."""

    own: Moments  # of the micro-batch, on this device
    influence: Moments  # its part of the whole batch's moments, to first order
    axis_name: AxisName | None
    groups: tuple[tuple[int, ...], ...] | None


class _StandIn:
    """Takes the place of `batch_norm` in training, and records its calls.

    Call k normalises by known[k]. Where that is not yet known it normalises by the
    statistics, and what comes of its result is not used.
    """

    def __init__(self, known: Sequence[Moments], number: int) -> None:
        self.known = known
        self.number = number
        self.calls: list[_Call] = []

    def __call__(
        self,
        params: BatchNormParams,
        stats: BatchStats,
        x: jax.Array,
        *,
        train: bool = True,
        axis: int | Sequence[int] = -1,
        decay: float | jax.Array = 0.99,
        eps: float = 1e-3,
        weights: jax.Array | None = None,
        axis_name: AxisName | None = None,
        axis_index_groups: AxisIndexGroups | None = None,
        activation: str | None = None,
        unbiased: bool = True,
    ) -> tuple[jax.Array, BatchStats]:
        def normalise(
            params: BatchNormParams, stats: BatchStats
        ) -> tuple[jax.Array, BatchStats]:
            return batch_norm(
                params,
                stats,
                x,
                train=False,
                axis=axis,
                decay=decay,
                eps=eps,
                weights=weights,
                activation=activation,
            )

        if not train:
            return normalise(params, stats)
        groups = collectives.check_groups(axis_name, axis_index_groups)
        unchanged = normalise(params, stats)  # checks the arguments, too
        arguments.check_precision(stats)
        parts = collectives.group_size(axis_name, groups) * self.number
        arguments.check_num_values(x, make_layout(x.shape, axis), parts)
        own = moments(x, axis=axis, weights=weights)
        k = len(self.calls)
        if k >= len(self.known):
            self.calls.append(_Call(own, own, axis_name, groups))
            return unchanged
        whole = self.known[k]
        at = jax.lax.stop_gradient(whole)
        influence = _influence(x, axis, weights, at)
        self.calls.append(_Call(own, influence, axis_name, groups))
        y, _ = normalise(
            _with_gradient(params, whole, at, eps), BatchStats(at.mean, at.var)
        )
        return y, update_stats(stats, at, decay=decay, unbiased=unbiased)


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
    x: jax.Array, axis: int | Sequence[int], weights: jax.Array | None, at: Moments
) -> Moments:
    """What has the derivatives of the whole batch's moments by one micro-batch.

    d mean = d sum(w (x - mean)) / m and d var = d sum(w ((x - mean)^2 - var)) / m, with
    mean, var and m held constant, since sum(w (x - mean)) is 0 over the whole batch.
    """
    layout = make_layout(x.shape, axis)
    weights = check_weights(x, weights)
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


def _merge(
    parts: Moments,
    axis_name: AxisName | None,
    groups: tuple[tuple[int, ...], ...] | None,
) -> Moments:
    """Merges moments along their leading axis, then over devices."""
    merged = merge_moments(*map(Moments._make, zip(*parts, strict=True)))
    if axis_name is None:
        return merged
    gathered = collectives.gather(jnp.stack(merged), axis_name, groups)
    return merge_moments(*map(Moments._make, gathered))


def _how_calls_share(
    run: Callable[..., tuple[jax.Array, Any, list[_Call]]],
    params: Any,
    micro_batches: Any,
) -> list[tuple[AxisName | None, tuple[tuple[int, ...], ...] | None]]:
    """The devices that each call of batch_norm shares moments with, from a trace."""
    sharing: list[tuple[AxisName | None, tuple[tuple[int, ...], ...] | None]] = []

    def trace(micro_batches: Any) -> None:
        first = jax.tree.map(lambda leaf: leaf[0], micro_batches)
        calls = run(params, (), first)[2]
        sharing.extend((call.axis_name, call.groups) for call in calls)

    jax.eval_shape(trace, micro_batches)
    if not sharing:
        raise ValueError(
            "loss_function never called the batch_norm that it was given; pass that "
            "one to the network instead of bn_jax.batch_norm."
        )
    return sharing


def _number_of_micro_batches(micro_batches: Any) -> int:
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(micro_batches)]
    if not shapes or any(not shape or shape[:1] != shapes[0][:1] for shape in shapes):
        raise ValueError(
            "micro_batches must be arrays with one leading axis of micro-batches, got "
            f"shapes {shapes}; reshape a batch to (micro-batches, size, ...)."
        )
    if shapes[0][0] == 0:
        raise ValueError("micro_batches are empty; expected one or more.")
    return shapes[0][0]
