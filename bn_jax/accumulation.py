"""Gradient accumulation over micro-batches, with the moments of the whole batch."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from bn_jax import collectives, dependence, gathering
from bn_jax.batch_norm import MOMENTS_NAME
from bn_jax.micro_batches import LAYER
from bn_jax.moments import Moments, merge_stacked
from bn_jax.statistics import BatchStats, MicroBatchStats

Params = TypeVar("Params")
Stats = TypeVar("Stats")


def accumulate_gradients(
    loss_function: Callable[[Params, Stats, Any], tuple[jax.Array, Stats]],
    params: Params,
    stats: Stats,
    micro_batches: Any,
) -> tuple[tuple[jax.Array, Stats], Params]:
    """Loss and gradients of a large batch, in the memory of one micro-batch.

    Every normalisation uses the moments of all micro-batches together, and the
    gradient flows through them: the result is that of the large batch, up to rounding.
    Of the activations, no more than one micro-batch's is held at a time.

    That costs time. A layer's moments are known only when all micro-batches have gone
    through the layers before it, and the gradient's part that flows through them only
    when it has come back through the layers after it. So where D normalisations follow
    one another, the micro-batches run D times forward, D times forward and back to the
    normalisations, and once forward and back as usual: 1 + D times the multiplications
    of the large batch. It is for networks of a few layers. For deep ones rather share
    moments over devices, compute activations again with `jax.checkpoint`, or let each
    micro-batch be a batch of its own (`ghost_batch_norm`); docs/small_batches.md
    compares them. The program does not grow with D.

    The mathematics: with M_k the moments of layer k and T_k what one micro-batch adds
    to them, dL/dM_k = sum over micro-batches of d(loss + sum_j <dL/dM_j, T_j>)/dM_k,
    where only later layers j depend on M_k, and dL/dparams likewise. Each pass computes
    all layers at once from the results of the pass before: after r of them the moments
    of the first r layers are right, and in the way back the derivatives of the last r.

    Args:
      loss_function: called as `loss_function(params, stats, micro_batch)`; returns the
        micro-batch's part of the loss, a scalar (parts are added, so divide by the
        number of examples of the large batch), and the new statistics. What it gets in
        the place of each `BatchStats` is a `MicroBatchStats`, which `batch_norm` and
        the Flax modules take in training, and return. It may use any transformation of
        JAX but gradients of its own and loops of unknown length. It runs many times on
        each micro-batch and must do the same each time: keys for dropout are to come
        with the micro-batch.
      params: what to differentiate by; any tree of floating-point arrays.
      stats: a tree whose layers are `BatchStats`, or Flax's collection `batch_stats`.
        Each layer is called once. What is no layer becomes what the last micro-batch
        returns for it.
      micro_batches: a tree of arrays whose leading axis is that of the micro-batches.

    Returns:
      ((loss, new statistics), gradients), as `jax.value_and_grad` with has_aux=True
      would of the large batch. Under `jax.pmap` or `jax.shard_map`, with axis_name
      given to `batch_norm`, loss and gradients are the device's part, as there.

    Raises:
      ValueError: no micro-batches, or leading axes that differ; the statistics come
        back in another structure, or a normalisation uses others or those of another
        layer; or as `batch_norm` raises.
      TypeError: a layer's statistics are for ghost batches or renormalisation; or as
        `batch_norm` raises.
    """
    number = _number_of_micro_batches(micro_batches)
    first = jax.tree.map(lambda leaf: leaf[0], micro_batches)
    if number == 1:
        return jax.value_and_grad(loss_function, has_aux=True)(params, stats, first)

    def run(
        params: Params, layers: list[MicroBatchStats], micro_batch: Any
    ) -> tuple[jax.Array, Stats]:
        layers_left = iter(layers)
        given = gathering.start(stats, lambda _: next(layers_left))
        loss, new = loss_function(params, given, micro_batch)
        gathering.check_returned(new, given, "loss_function")
        return loss, new

    layers = [_before_the_first_pass(layer.stats) for layer in gathering.layers(stats)]
    depth, layers = _depth_and_types(run, params, layers, first)

    def with_moments(whole: list[Moments]) -> list[MicroBatchStats]:
        return [
            layer._replace(whole=moments)
            for layer, moments in zip(layers, whole, strict=True)
        ]

    def moments_of_one_layer_more(_: Any, whole: list[Moments]) -> list[Moments]:
        def parts(micro_batch: Any) -> list[Moments]:
            _, new = run(params, with_moments(whole), micro_batch)
            return [layer.part for layer in _gathered(new)]

        return [merge_stacked(part) for part in jax.lax.map(parts, micro_batches)]

    whole = [layer.whole for layer in layers]
    whole = jax.lax.fori_loop(0, depth, moments_of_one_layer_more, whole)

    def with_what_flows_through_moments(
        params: Params, whole: list[Moments], gains: list[Moments], micro_batch: Any
    ) -> Any:
        """The loss, in value of no meaning, with the derivatives of the whole batch's.

        `gains` is what the whole batch's loss gains per unit of each layer's moments.
        """
        loss, new = run(params, with_moments(whole), micro_batch)
        influences = [layer.influence for layer in _gathered(new)]
        products = jax.tree.map(lambda g, t: jnp.sum(g * t), gains, influences)
        through = sum(jax.tree.leaves(products), start=jnp.zeros(()))
        return loss + through.astype(loss.dtype), (loss, new)

    def gains_of_one_layer_more(_: Any, gains: list[Moments]) -> list[Moments]:
        def of_micro_batch(micro_batch: Any) -> list[Moments]:
            differentiate = jax.grad(
                with_what_flows_through_moments, argnums=1, has_aux=True
            )
            return differentiate(params, whole, gains, micro_batch)[0]

        gains_of_parts = jax.lax.map(of_micro_batch, micro_batches)
        return jax.tree.map(lambda leaf: leaf.sum(0), gains_of_parts)

    gains = jax.lax.fori_loop(0, depth, gains_of_one_layer_more, _zeros_like(whole))

    def add(grads: Params, micro_batch: Any) -> tuple[Params, Any]:
        differentiate = jax.grad(with_what_flows_through_moments, has_aux=True)
        more, loss_and_stats = differentiate(params, whole, gains, micro_batch)
        return jax.tree.map(jnp.add, grads, more), loss_and_stats

    grads, (losses, new) = jax.lax.scan(add, _zeros_like(params), micro_batches)
    # Each micro-batch has moved the old statistics by the same moments.
    new = jax.tree.map(lambda leaf: leaf[-1], new)
    new = gathering.finish(new, new, lambda _, moved: BatchStats(*moved[:2]))
    return (losses.sum(0), new), grads


def _before_the_first_pass(stats: BatchStats) -> MicroBatchStats:
    """Where moments are not yet known, a layer normalises by mean 0 and variance 1."""
    # As exact as any input's, which is not known here.
    zero, one = (make(stats.mean.shape, float) for make in (jnp.zeros, jnp.ones))
    nothing = Moments(zero, zero, zero)
    whole = Moments(zero, zero, one)
    return MicroBatchStats(*stats, whole, part=nothing, influence=nothing)


def _gathered(stats: Any) -> list[MicroBatchStats]:
    return [layer.gathered for layer in gathering.layers(stats)]


def _depth_and_types(
    run: Callable[..., Any],
    params: Any,
    layers: list[MicroBatchStats],
    micro_batch: Any,
) -> tuple[int, list[MicroBatchStats]]:
    """How many normalisations follow one another, and layers of the loops' types.

    What `jax.shard_map` knows of the layers before the network ran is less than after:
    they vary over those devices that do not share moments.
    """
    trace = jax.make_jaxpr(run, return_shape=True)
    while True:
        program, shapes = trace(params, layers, micro_batch)
        axes = [
            jax.tree.map(collectives.varying_axes, after._replace(whole=after.part))
            for after in _gathered(shapes[1])
        ]
        varying = jax.tree.map(collectives.vary_over, layers, axes)
        if jax.tree.map(jax.typeof, varying) == jax.tree.map(jax.typeof, layers):
            break
        layers = varying

    in_batch = len(jax.tree.leaves(micro_batch))
    others = len(program.jaxpr.invars) - in_batch
    of_inputs = [dependence.INDEPENDENT] * others + [0] * in_batch
    of_results = dependence.depths(program.jaxpr, of_inputs, LAYER)
    _, depths = jax.tree.unflatten(jax.tree.structure(shapes), of_results)
    reached = gathering.layers(depths)
    _check_reached(reached, layers, program.jaxpr)
    return max((layer.gathered.part.mean for layer in reached), default=0), layers


def _check_reached(
    reached: list[gathering.Layer], layers: list[MicroBatchStats], jaxpr: Any
) -> None:
    """Each normalisation in training gathers in statistics of its own.

    Args:
      reached: the depths of the layers' fields after the network ran.
      layers: their statistics.
      jaxpr: the network's.

    Raises:
      ValueError: some do not.
    """
    trained = [layer.gathered.part.mean > 0 for layer in reached]
    others = [
        layer.path
        for layer, ours in zip(reached, trained, strict=True)
        if not ours and max(layer.stats) != dependence.INDEPENDENT
    ]
    if others:
        raise ValueError(
            f"the statistics of {', '.join(others)} move, but not by bn_jax's "
            "batch_norm; use its modules there, whose moments are accumulated."
        )
    if dependence.count(jaxpr, lambda name: name == MOMENTS_NAME):
        raise ValueError(
            "a batch normalisation trains with statistics that accumulate_gradients "
            "did not pass: it would use the moments of its micro-batch. Take all "
            "statistics from loss_function's argument stats, and see that "
            "accumulate_gradients got them."
        )

    def features(name: str) -> int:
        return int(name.removeprefix(LAYER)) if name.startswith(LAYER) else 0

    called = dependence.count(jaxpr, features)
    returned = sum(
        layer.mean.size for layer, ours in zip(layers, trained, strict=True) if ours
    )
    if called > returned:
        raise ValueError(
            f"batch normalisations in training normalise {called} features, but "
            f"statistics of {returned} come back: each call needs statistics of its "
            "own, and loss_function must return the new ones of all. A layer that is "
            "used twice has two sets of moments; give it two of statistics."
        )


def _zeros_like(tree: Any) -> Any:
    return jax.tree.map(
        lambda leaf: collectives.match_varying(jnp.zeros_like(leaf), leaf), tree
    )


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
