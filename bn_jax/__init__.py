"""Batch normalisation (Ioffe & Szegedy 2015) as a pure function in JAX."""

import jax.export

from bn_jax.batch_norm import MOMENTS_NAME, batch_norm
from bn_jax.folding import fold_conv, fold_dense, inference_affine
from bn_jax.ghost import ghost_batch_norm
from bn_jax.micro_batches import accumulate_gradients
from bn_jax.moments import Moments, merge_moments, moments
from bn_jax.params import BatchNormParams, init_params
from bn_jax.population import (
    PopulationMoments,
    finalize_population,
    finish_population,
    init_population,
    merge_populations,
    population_statistics,
    start_population,
    update_population,
)
from bn_jax.renormalisation import batch_renorm
from bn_jax.statistics import BatchStats, init_stats

# So that `jax.export` can serialise functions of them.
for _type in (BatchNormParams, BatchStats, Moments, PopulationMoments):
    jax.export.register_namedtuple_serialization(
        _type, serialized_name=f"bn_jax.{_type.__name__}"
    )

__version__ = "0.1.0"

__all__ = [
    "MOMENTS_NAME",
    "BatchNormParams",
    "BatchStats",
    "Moments",
    "PopulationMoments",
    "accumulate_gradients",
    "batch_norm",
    "batch_renorm",
    "finalize_population",
    "finish_population",
    "fold_conv",
    "fold_dense",
    "ghost_batch_norm",
    "inference_affine",
    "init_params",
    "init_population",
    "init_stats",
    "merge_moments",
    "merge_populations",
    "moments",
    "population_statistics",
    "start_population",
    "update_population",
]
