"""Population statistics: Algorithm 2's averages over many batches, one at a time."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from bn_jax import collectives
from bn_jax.collectives import AxisName
from bn_jax.moments import Moments, merge_moments
from bn_jax.passes import nonzero
from bn_jax.statistics import BatchStats

# Beside `mean` and `var` of a layer in Flax's collection `batch_stats`, while batches
# are gathered.
POPULATION = "population"


class PopulationMoments(NamedTuple):
    """What the batches so far say about the population, per feature.

    In the place of `BatchStats`, `bn_jax.batch_norm` in training adds its batch's
    moments to it. All fields are (features), float32 or float64.
    """

    # The checker minds that the name hides tuple.count.
    count: jax.Array  # type: ignore[assignment] # values, or their total weight
    mean: jax.Array  # of all values
    var: jax.Array  # of all values, biased
    var_within: jax.Array  # of values about the mean of their own batch, biased
    num_batches: jax.Array  # batches that had a value


Statistics = TypeVar("Statistics", BatchStats, PopulationMoments)


def init_population(
    num_features: int | Sequence[int], dtype: DTypeLike = jnp.float32
) -> PopulationMoments:
    """Before the first batch.

    Args:
      num_features: size of the feature axis, or the sizes of several.
      dtype: float32, or float64 to match float64 input.
    """
    return PopulationMoments(
        *(jnp.zeros(num_features, dtype) for _ in PopulationMoments._fields)
    )


def update_population(
    population: PopulationMoments, *batches: Moments
) -> PopulationMoments:
    """Adds a batch, or several.

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
    return merge_populations(population, *added)


def merge_populations(
    *parts: PopulationMoments, axis_name: AxisName | None = None
) -> PopulationMoments:
    """The population of all batches, from those that processes or devices have seen.

    Args:
      *parts: populations of one shape each, of disjoint sets of batches.
      axis_name: mapped axis or axes whose devices have each seen batches of their own.
        Not for batches whose moments the devices shared already.

    Returns:
      The population of all parts and all devices.

    Raises:
      ValueError: no parts, or parts of different shapes.
    """
    total = merge_moments(*(Moments(p.count, p.mean, p.var) for p in parts))
    divisor = nonzero(total.count)
    # Sums of few parts, each by its share: nothing cancels.
    merged = PopulationMoments(
        *total,
        var_within=_sum(p.count / divisor * p.var_within for p in parts),
        num_batches=_sum(p.num_batches for p in parts),
    )
    if axis_name is None:
        return merged
    stacked = collectives.gather(jnp.stack(merged), axis_name, None)
    return merge_populations(*(PopulationMoments(*device) for device in stacked))


def _sum(values: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, values)


def finalize_population(
    population: PopulationMoments, *, pooled: bool = False
) -> BatchStats:
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
      population: of all batches.
      pooled: as if all batches were one: var = M / (M - 1) times the variance of all
        values about their common mean, that between the batch means included.

    Returns:
      Mean and variance, (features) each; NaN where there was no value.
    """
    count, mean, var, var_within, num_batches = population
    lost = jnp.minimum(num_batches, 1) if pooled else num_batches
    degrees_of_freedom = jnp.maximum(count - lost, count / 2)
    unbiased = (var if pooled else var_within) * (count / degrees_of_freedom)
    return BatchStats(jnp.where(count > 0, mean, jnp.nan), unbiased)


def start_population(stats: Any) -> Any:
    """Makes statistics that gather batches, in the structure of a model's own.

    Args:
      stats: a tree whose layers are `BatchStats`, or mappings with `mean` and `var`
        as in Flax's collection `batch_stats`.

    Returns:
      The tree with an empty `PopulationMoments` in the place of every `BatchStats`, and
      beside every Flax layer's `mean` and `var`. A model in training takes it as its
      statistics, and returns it with its batch added.
    """

    def start(layer: Any) -> Any:
        if not _is_layer(layer):
            return layer
        mean = _stats_of(layer).mean
        # Like the old ones, they may be spread over the devices of several processes.
        empty = PopulationMoments(
            *(jnp.zeros_like(mean) for _ in PopulationMoments._fields)
        )
        if isinstance(layer, BatchStats):
            return empty
        return type(layer)({**layer, POPULATION: empty})

    return jax.tree.map(start, stats, is_leaf=_is_layer)


def finish_population(gathered: Any, stats: Any, *, pooled: bool = False) -> Any:
    """Makes a model's statistics of those that have gathered batches.

    Args:
      gathered: `start_population(stats)` after some batches.
      stats: the model's old statistics.
      pooled: see `finalize_population`.

    Returns:
      The old statistics' tree with every layer's mean and variance those of the
      population; where a layer saw no value, and for whatever is no layer, the old.
    """

    def finish(layer: Any, found: Any) -> Any:
        if not _is_layer(layer):
            return layer
        population = _population_of(found)
        new = finalize_population(population, pooled=pooled)
        old = _stats_of(layer)
        seen = population.count > 0
        kept = BatchStats(
            *(
                jnp.where(seen, after, _from_host(before)).astype(before.dtype)
                for after, before in zip(new, old, strict=True)
            )
        )
        if isinstance(layer, BatchStats):
            return kept
        return type(layer)({**layer, **kept._asdict()})

    return jax.tree.map(finish, stats, gathered, is_leaf=_is_layer)


def population_statistics(
    run: Callable[[Any, Any], Any],
    stats: Any,
    batches: Iterable[Any],
    *,
    pooled: bool = False,
    keep_unseen: bool = False,
) -> Any:
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
      batches: what `run` takes; of any sizes, see `finalize_population`.
      pooled: as if all batches were one; see `finalize_population`.
      keep_unseen: leave the statistics of layers that saw no batch, such as frozen
        ones, as they are.

    Returns:
      New statistics, of the structure, shapes and dtypes of the old.

    Raises:
      ValueError: there is no layer or no batch, `run` returns another structure, or
        layers saw no batch and keep_unseen is False.
    """
    if jax.tree.leaves(stats) and not _layers(stats):
        raise ValueError(
            "stats hold no layer: expected a tree of BatchStats, or Flax's collection "
            f"batch_stats, got {jax.tree.structure(stats)}."
        )
    gathered = start_population(stats)
    for batch in batches:
        found = run(gathered, batch)
        expected, got = (str(jax.tree.structure(tree)) for tree in (gathered, found))
        if got != expected:
            raise ValueError(
                "run must return the statistics in the structure in which it got them, "
                f"{expected}, got {got}; with Flax, return updated['batch_stats']."
            )
        gathered = found
    if not keep_unseen:
        check_seen(gathered)
    return finish_population(gathered, stats, pooled=pooled)


def check_seen(gathered: Any) -> None:
    """Every layer has seen a value, where that is known.

    Args:
      gathered: `start_population(stats)` after some batches.

    Raises:
      ValueError: some layers have not; the message names them.
    """
    counts = {path: _population_of(of).count for path, of in _layers(gathered).items()}
    unseen = [
        path
        for path, count in counts.items()
        if not isinstance(count, jax.core.Tracer) and not np.any(count)
    ]
    if unseen:
        raise ValueError(
            f"no batch reached {', '.join(unseen)}. Pass at least one batch, run the "
            "model in training mode, and see that these layers are bn_jax's; for "
            "frozen layers, which keep their statistics, pass keep_unseen=True."
        )


def _from_host(value: jax.Array) -> jax.Array | np.ndarray:
    # Of several processes, `jax.pmap` leaves its results on each one's own devices,
    # and statistics from a checkpoint are on all.
    return value if isinstance(value, jax.core.Tracer) else np.asarray(value)


def _layers(tree: Any) -> dict[str, Any]:
    """The layers of a tree of statistics, gathering or not, by their path."""

    def is_layer(node: Any) -> bool:
        return isinstance(node, PopulationMoments) or _is_layer(node)

    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_layer)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/") or "the layer": leaf
        for path, leaf in leaves
        if is_layer(leaf)
    }


def _is_layer(node: Any) -> bool:
    if isinstance(node, Mapping):
        fields = [node.get(name) for name in BatchStats._fields]
        return not any(field is None or isinstance(field, Mapping) for field in fields)
    return isinstance(node, BatchStats)


def _stats_of(layer: Any) -> BatchStats:
    if isinstance(layer, BatchStats):
        return layer
    return BatchStats(*(layer[name] for name in BatchStats._fields))


def _population_of(layer: Any) -> PopulationMoments:
    return layer if isinstance(layer, PopulationMoments) else layer[POPULATION]
