"""Batch normalisation (Ioffe & Szegedy 2015) as a pure function in JAX."""

import contextlib

import jax.export

from bn_jax.accumulation import accumulate_gradients
from bn_jax.batch_norm import MOMENTS_NAME, batch_norm
from bn_jax.folding import fold_conv, fold_dense, inference_affine
from bn_jax.ghost import ghost_batch_norm
from bn_jax.moments import Moments, merge_moments, moments
from bn_jax.params import BatchNormParams, init_params
from bn_jax.population import population_statistics
from bn_jax.recurrent import Carry, RecurrentParams
from bn_jax.renormalisation import batch_renorm
from bn_jax.statistics import (
    BatchStats,
    MicroBatchStats,
    PopulationMoments,
    init_stats,
)

# So that `jax.export` can serialise functions of them. JAX refuses a name that it has,
# as when a notebook loads the package again.
for _type in (
    BatchNormParams,
    BatchStats,
    Carry,
    MicroBatchStats,
    Moments,
    PopulationMoments,
    RecurrentParams,
):
    with contextlib.suppress(ValueError):
        jax.export.register_namedtuple_serialization(
            _type, serialized_name=f"bn_jax.{_type.__name__}"
        )

__version__ = "0.1.0"

__all__ = [
    "MOMENTS_NAME",
    "BatchNormParams",
    "BatchStats",
    "Moments",
    "accumulate_gradients",
    "batch_norm",
    "batch_renorm",
    "fold_conv",
    "fold_dense",
    "ghost_batch_norm",
    "inference_affine",
    "init_params",
    "init_stats",
    "merge_moments",
    "moments",
    "population_statistics",
]
