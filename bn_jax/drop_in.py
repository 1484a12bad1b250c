"""What Flax's modules take that `batch_norm` does not: masks, dtypes, one example.

Shared by the adapters for linen and nnx, so that the two cannot differ.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from bn_jax.layout import make_layout
from bn_jax.params import BatchNormParams
from bn_jax.renormalisation import batch_renorm
from bn_jax.statistics import PopulationMoments, Statistics
from bn_jax.transform import batch_norm
from bn_jax.virtual_batches import ghost_batch_norm

# r_max and d_max of batch renormalisation.
Limits = tuple[float | jax.Array, float | jax.Array]


def apply_module(
    params: BatchNormParams,
    stats: Statistics,
    x: jax.Array,
    *,
    train: bool,
    dtype: DTypeLike | None,
    mask: jax.Array | None,
    weights: jax.Array | None,
    virtual_batch_size: int | None = None,
    renormalisation: Limits | None = None,
    initialising: bool = False,
    **options: Any,
) -> tuple[jax.Array, Statistics]:
    """`batch_norm` as Flax's modules call it.

    Args:
      params: as `batch_norm` takes them.
      stats: as `batch_norm` takes them, but of any floating dtype.
      x: any rank; whole numbers are converted.
      train: normalise by the batch.
      dtype: of y; None for what x and the parameters promote to, as in Flax.
      mask: True (or not 0) for values that count; broadcastable to x.
      weights: as `batch_norm` takes them; instead of a mask.
      virtual_batch_size: as `ghost_batch_norm` takes it; None for whole batches.
      renormalisation: r_max and d_max of `batch_renorm`; None for none.
      initialising: outside any map over devices, and perhaps with one example, which
        is then normalised by the statistics.
      **options: further arguments of `batch_norm`.

    Returns:
      y, and the new statistics in the old ones' dtype.

    Raises:
      ValueError: mask and weights are both given, the mask does not broadcast, dtype
        is not floating point, or virtual batches are to share moments or to be
        renormalised; and what `batch_norm` raises.
    """
    x = jnp.asarray(x)
    if mask is not None and weights is not None:
        raise ValueError(
            "mask and weights were both given; a mask is weights of 0 and 1: pass "
            "weights alone, multiplied by the mask."
        )
    if mask is not None:
        weights = _as_weights(jnp.asarray(mask, bool), x.shape)
    transform: Callable[..., Any] = batch_norm
    if initialising:
        options |= {"axis_name": None, "axis_index_groups": None}
        train = train and make_layout(x.shape, options["axis"]).num_positions > 1
    elif virtual_batch_size is not None:
        shares = {options.pop("axis_name"), options.pop("axis_index_groups")} != {None}
        _check_virtual(shares, renormalisation)
        transform = functools.partial(
            ghost_batch_norm, virtual_batch_size=virtual_batch_size
        )
    # Every layer normalises by its own batch while a population is gathered.
    elif renormalisation is not None and not isinstance(stats, PopulationMoments):
        r_max, d_max = renormalisation
        transform = functools.partial(batch_renorm, r_max=r_max, d_max=d_max)
    # Flax promotes, whatever JAX is told about implicit promotion.
    with jax.numpy_dtype_promotion("standard"):
        result = _result_dtype(x, params, dtype)
        exact = x.dtype if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.float32
        # In the wider dtype, so that the statistics are of x before it is rounded.
        x = x.astype(jnp.promote_types(exact, result))
        wide = jax.tree.map(
            lambda stat: stat.astype(jnp.promote_types(stat.dtype, jnp.float32)), stats
        )
    y, new = transform(params, wide, x, train=train, weights=weights, **options)
    kept = jax.tree.map(lambda stat, old: stat.astype(old.dtype), new, stats)
    return y.astype(result), kept


def _check_virtual(shares: bool, renormalisation: Limits | None) -> None:
    if shares:
        raise ValueError(
            "virtual_batch_size and axis_name were both given; the moments of virtual "
            "batches stay on their device. Leave axis_name out, and average "
            "batch_stats over devices with jax.lax.pmean."
        )
    if renormalisation is not None:
        raise ValueError(
            "virtual_batch_size and renormalisation were both given; one makes batches "
            "small, the other is against small batches. Leave one out."
        )


def _as_weights(mask: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    rank = len(shape)
    if mask.ndim > rank or any(
        size not in (1, full)
        for size, full in zip(mask.shape[::-1], shape[::-1], strict=False)
    ):
        raise ValueError(
            f"mask of shape {mask.shape} does not broadcast to x of shape {shape}; one "
            f"value per example has shape {(*shape[:1], *(1,) * (rank - 1))}."
        )
    return mask.reshape((1,) * (rank - mask.ndim) + mask.shape)


def _result_dtype(
    x: jax.Array, params: BatchNormParams, dtype: DTypeLike | None
) -> jnp.dtype:
    if dtype is None:
        found = jnp.result_type(x, *(value for value in params if value is not None))
        if jnp.issubdtype(found, jnp.inexact):
            return found
        return jnp.promote_types(jnp.float32, found)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"dtype must be floating point, got {jnp.dtype(dtype)}; it is that of the "
            "output."
        )
    return jnp.dtype(dtype)
