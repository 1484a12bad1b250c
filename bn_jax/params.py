"""The learned scale and bias (gamma and beta in the paper)."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


class BatchNormParams(NamedTuple):
    """One pair per normalised activation; a missing one counts as scale 1 or bias 0."""

    scale: jax.Array | None  # (features), any floating dtype: gamma
    bias: jax.Array | None  # (features), any floating dtype: beta


def init_params(
    num_features: int | Sequence[int], dtype: DTypeLike = jnp.float32
) -> BatchNormParams:
    """Parameters of the identity after normalisation: scale 1 and bias 0.

    Args:
      num_features: size of the feature axis, or the sizes of several.
      dtype: of both.
    """
    return BatchNormParams(
        scale=jnp.ones(num_features, dtype), bias=jnp.zeros(num_features, dtype)
    )
