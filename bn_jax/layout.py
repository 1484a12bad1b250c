"""Which axes of an array hold features, and which hold positions to average over."""

import math
import operator
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Layout(NamedTuple):
    """How the axes of one input array are used.

    Every field follows from the input's shape and the feature axes, so a layout is
    static: it can be an argument of a jitted function's trace.
    """

    feature_axes: tuple[int, ...]  # ascending, not negative
    position_axes: tuple[int, ...]  # all the others: the ones that are reduced
    feature_shape: tuple[int, ...]  # the input's sizes along feature_axes
    num_positions: int  # values of one feature in the input; 0 for an empty batch

    def expand(self, per_feature: jax.Array) -> jax.Array:
        """Gives a per-feature array the input's rank, for broadcasting against it."""
        return jnp.expand_dims(per_feature, self.position_axes)


def make_layout(shape: Sequence[int], axis: int | Sequence[int]) -> Layout:
    """Derives the layout of an input.

    Args:
      shape: the input's shape.
      axis: the feature axis or axes; negative ones count from the end.

    Returns:
      The layout. Features keep the order that they have in the input, whatever the
      order of `axis`.

    Raises:
      TypeError: an axis is not an integer.
      ValueError: an axis is out of range or named twice.
    """
    rank = len(shape)
    feature_axes = set()
    for entry in axis if isinstance(axis, Sequence) else (axis,):
        try:
            index = operator.index(entry)
        except TypeError:
            raise TypeError(
                f"axis must be an integer or a sequence of integers, got {axis!r}."
            ) from None
        if not -rank <= index < rank:
            raise ValueError(
                f"axis {index} is out of range for an input of shape {tuple(shape)}; "
                f"expected feature axes from {-rank} to {rank - 1}."
            )
        if index % rank in feature_axes:
            raise ValueError(
                f"axis={axis!r} names one axis of an input of shape {tuple(shape)} "
                "twice; name each feature axis once."
            )
        feature_axes.add(index % rank)
    position_axes = tuple(i for i in range(rank) if i not in feature_axes)
    return Layout(
        feature_axes=tuple(sorted(feature_axes)),
        position_axes=position_axes,
        feature_shape=tuple(shape[i] for i in sorted(feature_axes)),
        num_positions=math.prod(shape[i] for i in position_axes),
    )
