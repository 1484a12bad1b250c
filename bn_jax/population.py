"""Population statistics: Algorithm 2's averages over many batches, one at a time."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from bn_jax import collectives, gathering
from bn_jax.collectives import AxisName
from bn_jax.gathering import Tree
from bn_jax.moments import Moments, merge_moments
from bn_jax.passes import nonzero, statistics_dtype
from bn_jax.statistics import BatchStats, PopulationMoments

__all__ = [
    "PopulationMoments",
    "check_seen",
    "finalize",
    "init",
    "merge",
    "population_statistics",
    "update",
]

Batch = TypeVar("Batch")


def init(stats: Any) -> Any:
    """Before the first batch.

    Args:
      stats: a model's statistics: a `BatchStats`, a tree whose layers are such, or
        Flax's collection `batch_stats`.

    Returns:
      The tree with an empty `PopulationMoments` in the place of every `BatchStats`, and
      beside every Flax layer's `mean` and `var`. A model in training takes it as its
      statistics, and returns it with its batch added.
    """

    def empty(layer: BatchStats) -> PopulationMoments:
        # Like the old ones, they may be spread over the devices of several processes.
        nothing = jnp.zeros_like(layer.mean, statistics_dtype(layer.mean))
        return PopulationMoments(*[nothing] * len(PopulationMoments._fields))

    return gathering.start(stats, empty)


def update(population: PopulationMoments, *batches: Moments) -> PopulationMoments:
    """Adds a batch of one layer, or several.

    Args:
      population: of the batches so far.
      *batches: moments of each, (features), shared over devices or not.

    Returns:
      The population with the batches, in its own dtype. No gradient flows into it.
    """
    added = []
    for batch in jax.lax.stop_gradient(batches):
        count, mean, var = (field.astype(population.mean.dtype) for field in batch)
        has_values = (count > 0).astype(count.dtype)
        added.append(PopulationMoments(count, mean, var, var, has_values))
    return _merge(population, *added)


def merge(gathered: Tree, *others: Tree, axis_name: AxisName | None = None) -> Tree:
    """The population of all batches, from those that processes or devices have seen.

    Args:
      gathered: what some batches were gathered in, of `init`.
      *others: the same of other batches, with the same layers.
      axis_name: mapped axis or axes whose devices have each seen batches of their own.
        Not for batches whose moments the devices shared already.

    Returns:
      The population of all parts and all devices, layer by layer.

    Raises:
      ValueError: layers differ in their shapes.
    """

    def of_layer(*parts: Any) -> Any:
        if not _is_population(parts[0]):
            return parts[0]
        merged = _merge(*parts)
        if axis_name is None:
            return merged
        stacked = collectives.gather(jnp.stack(merged), axis_name, None)
        return _merge(*(PopulationMoments(*device) for device in stacked))

    return jax.tree.map(of_layer, gathered, *others, is_leaf=_is_population)


def finalize(gathered: Any, stats: Tree, *, pooled: bool = False) -> Tree:
    """Statistics for inference from the batches that were gathered (Algorithm 2).

    With m_i values in batch i, of mean mu_i and biased variance v_i, M values and N
    batches in all:

      mean = sum(m_i * mu_i) / M,  var = sum(m_i * v_i) / (M - N)

    For batches of one size m that is Algorithm 2: the average of the batch means, and
    m / (m - 1) times the average of the batch variances. For batches of any sizes,
    values drawn from one population give unbiased estimates of its mean and variance.
    Weights are counts, as everywhere: a mean weight below 2 a batch gives no meaningful
    correction, and is taken as 2.

    Args:
      gathered: `init(stats)` after some batches.
      stats: the model's old statistics.
      pooled: as if all batches were one: var = M / (M - 1) times the variance of all
        values about their common mean, that between the batch means included.

    Returns:
      The old statistics' tree, shapes and dtypes with every layer's mean and variance
      those of the population; the old ones where a layer saw no value, and whatever is
      no layer.
    """

    def of_layer(old: BatchStats, population: PopulationMoments) -> BatchStats:
        count, mean, var, var_within, num_batches = population
        lost = jnp.minimum(num_batches, 1) if pooled else num_batches
        degrees_of_freedom = nonzero(jnp.maximum(count - lost, count / 2))
        unbiased = (var if pooled else var_within) * (count / degrees_of_freedom)
        return BatchStats(
            *(
                jnp.where(count > 0, after.astype(before.dtype), _from_host(before))
                for after, before in zip((mean, unbiased), old, strict=True)
            )
        )

    return gathering.finish(stats, gathered, of_layer)


def population_statistics(
    run: Callable[[Tree, Batch], Tree],
    stats: Tree,
    batches: Iterable[Batch],
    *,
    pooled: bool = False,
    keep_unseen: bool = False,
) -> Tree:
    """Statistics for inference, re-estimated over batches (Algorithm 2, lines 7 to 10).

    All layers' statistics come from one pass over the batches, in which every layer
    normalises by its own batch: the network is the paper's training network, with its
    parameters fixed, and what a layer sees does not depend on the statistics below it.

    Args:
      run: called as run(stats, batch) for each batch; runs the model in training mode
        on fixed parameters and returns its new statistics. Pass it compiled, by
        `jax.jit`, `jax.pmap` or `jax.jit(jax.shard_map(...))`. Moments shared over
        devices and processes give the statistics of their batches as one.
      stats: the model's statistics: a tree whose layers are `BatchStats`, or Flax's
        collection `batch_stats` of layers of `bn_jax.linen`.
      batches: what `run` takes; of any sizes, see `finalize`.
      pooled: as if all batches were one; see `finalize`.
      keep_unseen: leave the statistics of layers that saw no batch, such as frozen
        ones, as they are.

    Returns:
      New statistics, of the structure, shapes and dtypes of the old.

    Raises:
      ValueError: there is no layer or no batch, `run` returns another structure, or
        layers saw no batch and keep_unseen is False.
    """
    if jax.tree.leaves(stats) and not gathering.layers(stats):
        raise ValueError(
            "stats hold no layer: expected a tree of BatchStats, or Flax's collection "
            f"batch_stats, got {jax.tree.structure(stats)}."
        )
    gathered: Tree = init(stats)
    for batch in batches:
        found = run(gathered, batch)
        gathering.check_returned(found, gathered, "run")
        gathered = found
    if not keep_unseen:
        check_seen(gathered)
    return finalize(gathered, stats, pooled=pooled)


def check_seen(gathered: Any) -> None:
    """Every layer has seen a value, where that is known.

    Args:
      gathered: `init(stats)` after some batches.

    Raises:
      ValueError: some layers have not; the message names them.
    """
    unseen = [
        layer.path
        for layer in gathering.layers(gathered)
        if not isinstance(layer.gathered.count, jax.core.Tracer)
        and not np.any(layer.gathered.count)
    ]
    if unseen:
        raise ValueError(
            f"no batch reached {', '.join(unseen)}. Pass at least one batch, run the "
            "model in training mode, and see that these layers are bn_jax's; for "
            "frozen layers, which keep their statistics, pass keep_unseen=True."
        )


def _merge(*parts: PopulationMoments) -> PopulationMoments:
    total = merge_moments(*(Moments(p.count, p.mean, p.var) for p in parts))
    divisor = nonzero(total.count)
    # Sums of few parts, each by its share: nothing cancels.
    within = [p.count / divisor * p.var_within for p in parts]
    return PopulationMoments(
        *total,
        var_within=functools.reduce(jnp.add, within),
        num_batches=functools.reduce(jnp.add, [p.num_batches for p in parts]),
    )


def _from_host(value: jax.Array) -> jax.Array | np.ndarray:
    # Of several processes, `jax.pmap` leaves its results on each one's own devices,
    # and statistics from a checkpoint are on all.
    return value if isinstance(value, jax.core.Tracer) else np.asarray(value)


def _is_population(node: Any) -> bool:
    return isinstance(node, PopulationMoments)
