"""Trees of statistics that gather batches, in the place of those that a model moves.

A layer of a tree is a `BatchStats`, or a mapping with `mean` and `var`, as in Flax's
collection `batch_stats`. What gathers is a NamedTuple in the place of the one, and an
entry beside mean and variance of the other.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from bn_jax.statistics import BatchStats, MicroBatchStats, PopulationMoments

# The entry's name. Modules for Flax that find it use it as their statistics.
GATHERING = "gathering"

Tree = TypeVar("Tree")


def start(stats: Tree, begin: Callable[[BatchStats], Any]) -> Tree:
    """Lets every layer gather.

    Args:
      stats: a model's statistics.
      begin: makes the statistics that gather of a layer's own; called in the order of
        the tree.

    Returns:
      The tree with what `begin` returns for every layer. A model in training takes it
      as its statistics, and returns it with its batch added.
    """

    def of_layer(node: Any) -> Any:
        if not _is_layer(node):
            return node
        new = begin(_stats_of(node))
        return type(node)({**node, GATHERING: new}) if _is_mapping(node) else new

    return jax.tree.map(of_layer, stats, is_leaf=_is_layer)


def finish(stats: Tree, gathered: Any, end: Callable[[BatchStats, Any], Any]) -> Tree:
    """Makes a model's statistics of those that have gathered.

    Args:
      stats: a model's statistics, gathering or not; what is no layer is taken from it.
      gathered: a tree of `start`, after some batches.
      end: makes a layer's `BatchStats` of those in `stats` and what was gathered.

    Returns:
      `stats` with the results of `end`.
    """

    def of_layer(node: Any, found: Any) -> Any:
        if not _is_layer(node):
            return node
        new = end(_stats_of(node), _gathered(found))
        if not _is_mapping(node):
            return new
        kept = {name: value for name, value in node.items() if name != GATHERING}
        return type(node)(kept | new._asdict())

    return jax.tree.map(of_layer, stats, gathered, is_leaf=_is_layer)


class Layer(NamedTuple):
    """A layer of a tree."""

    path: str
    stats: BatchStats
    gathered: Any  # the statistics that gather, where it has such


def layers(tree: Any) -> list[Layer]:
    """The layers of a tree, gathering or not, in its order."""
    return [
        Layer(
            jax.tree_util.keystr(path, simple=True, separator="/") or "the layer",
            _stats_of(node),
            _gathered(node),
        )
        for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_layer)
        if _is_layer(node)
    ]


def check_returned(found: Any, expected: Any, function: str) -> None:
    """A function returned the statistics in the structure in which it got them.

    Raises:
      ValueError: it did not, or changed shapes.
    """
    wanted, got = (
        f"{jax.tree.structure(tree)} of shapes "
        f"{[np.shape(leaf) for leaf in jax.tree.leaves(tree)]}"
        for tree in (expected, found)
    )
    if got != wanted:
        raise ValueError(
            f"{function} must return the statistics in the structure in which it got "
            f"them, {wanted}, got {got}; with Flax, return updated['batch_stats']."
        )


def _gathered(layer: Any) -> Any:
    return layer.get(GATHERING) if _is_mapping(layer) else layer


def _stats_of(layer: Any) -> BatchStats:
    fields = layer if _is_mapping(layer) else layer._asdict()
    return BatchStats(*(fields[name] for name in BatchStats._fields))


def _is_mapping(layer: Any) -> bool:
    return isinstance(layer, Mapping)


def _is_layer(node: Any) -> bool:
    if isinstance(node, Mapping):
        fields = [node.get(name) for name in BatchStats._fields]
        return not any(field is None or isinstance(field, Mapping) for field in fields)
    return isinstance(node, BatchStats | PopulationMoments | MicroBatchStats)
