"""Normalisation that the gradient does not know of: section 2's failure."""

import jax
import jax.numpy as jnp

import bn_jax
from bn_jax import BatchNormParams, BatchStats


def normalise_outside_gradient(
    params: BatchNormParams,
    stats: BatchStats,
    x: jax.Array,
    *,
    centre_only: bool = False,
    decay: float = 0.99,
    eps: float = 1e-5,
) -> tuple[jax.Array, BatchStats]:
    """Normalises by the batch's moments, as if they were constants to the gradient.

    What section 2 of Ioffe & Szegedy 2015 warns of. Where x = u + b, a step changes b
    by -rate * dl/dxhat, and subtracting the mean takes the change away again: output
    and loss stay, and b grows without an end. Forward, it is
    `bn_jax.batch_norm(..., train=True)`.

    Args:
      params: as for `bn_jax.batch_norm`.
      stats: as for it.
      x: (examples, ..., features).
      centre_only: subtract the mean, and do not divide by the standard deviation, as in
        the paper's example.
      decay: of the moving averages.
      eps: added to the variance.

    Returns:
      y, of x's shape and dtype, and the statistics after the batch.
    """
    batch = jax.lax.stop_gradient(bn_jax.moments(x))
    # So that the deviation is 1.
    var = jnp.full_like(batch.var, 1 - eps) if centre_only else batch.var
    y, _ = bn_jax.batch_norm(
        params, BatchStats(batch.mean, var), x, train=False, eps=eps
    )
    _, moved = bn_jax.batch_norm(params, stats, x, train=True, decay=decay, eps=eps)
    if centre_only:
        moved = BatchStats(moved.mean, jnp.full_like(moved.var, 1 - eps))
    return y, jax.lax.stop_gradient(moved)
