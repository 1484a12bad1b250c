"""Batch normalisation with a random shift and scale after it."""

from typing import NamedTuple

import jax

import bn_jax
from bn_jax import BatchNormParams, BatchStats


class Noise(NamedTuple):
    """How wide the noise is; the defaults are our reading of Santurkar et al."""

    shift: float = 0.5  # each unit's shift in a step, about 0
    scale: float = 1.25  # the largest of each unit's scales in a step; the least is 1
    shift_of_example: float = 0.1  # about the unit's
    scale_of_example: float = 0.1  # about the unit's


DEFAULT_NOISE = Noise()


def noisy_batch_norm(
    key: jax.Array,
    params: BatchNormParams,
    stats: BatchStats,
    x: jax.Array,
    *,
    noise: Noise = DEFAULT_NOISE,
    decay: float = 0.99,
    eps: float = 1e-5,
) -> tuple[jax.Array, BatchStats]:
    """Normalises by the batch, then undoes mean 0 and variance 1 at random.

    The noisy batch normalisation of Santurkar et al. 2018 (section 2.1, the algorithm
    of their appendix): in every step every unit draws a shift from U(-shift, shift) and
    a scale from U(1, scale), and every example its own about these. So the distribution
    that the next layer sees is another one in every step. At inference there is no
    noise: `bn_jax.batch_norm` with train=False.

    Args:
      key: a random key, another one in every step and layer.
      params: as for `bn_jax.batch_norm`.
      stats: as for it.
      x: (examples, units); the last axis is the feature axis.
      noise: how wide it is.
      decay: as for `bn_jax.batch_norm`.
      eps: as for it.

    Returns:
      y, of x's shape and dtype, and the new statistics, which the noise does not
      change.
    """
    y, stats = bn_jax.batch_norm(params, stats, x, train=True, decay=decay, eps=eps)
    keys = jax.random.split(key, 4)
    unit, dtype = y.shape[-1:], y.dtype
    shift = jax.random.uniform(keys[0], unit, dtype, -noise.shift, noise.shift)
    scale = jax.random.uniform(keys[1], unit, dtype, 1, noise.scale)
    shift += noise.shift_of_example * jax.random.uniform(keys[2], y.shape, dtype, -1, 1)
    scale += noise.scale_of_example * jax.random.uniform(keys[3], y.shape, dtype, -1, 1)
    return y * scale + shift, stats
