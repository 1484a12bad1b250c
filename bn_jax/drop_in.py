"""What Flax's modules take that `batch_norm` does not: masks, dtypes, one example.

Shared by the adapters for linen and nnx, so that the two cannot differ.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from bn_jax.arguments import check_choices
from bn_jax.batch_norm import Limits, batch_norm
from bn_jax.ghost import ghost_batch_norm
from bn_jax.layout import make_layout
from bn_jax.params import BatchNormParams
from bn_jax.renormalisation import batch_renorm
from bn_jax.statistics import PopulationMoments, Statistics

# What the constructors of `flax.linen.BatchNorm` and `flax.nnx.BatchNorm` take that is
# known here: used, or of no effect on purpose. A new Flax is one name more.
FLAX_ARGUMENTS = """
    self num_features use_running_average axis momentum epsilon dtype param_dtype
    use_bias use_scale bias_init scale_init axis_name axis_index_groups
    use_fast_variance force_float32_reductions promote_dtype rngs bias_metadata
    scale_metadata parent name
"""


def check_constructor(layer: Any, flax_layer: type, values: Mapping[str, Any]) -> None:
    """Checks what a module was constructed with, for linen and nnx alike.

    Args:
      layer: ours, with its attributes.
      flax_layer: the class that it is derived from.
      values: by name, those given to the constructor or the module's attributes.

    Raises:
      ValueError: of our own arguments, one makes no sense.
      TypeError: an argument that Flax has and that is not known here is not left at its
        default.
    """
    parameters = inspect.signature(vars(flax_layer)["__init__"]).parameters
    for name in parameters.keys() - set(FLAX_ARGUMENTS.split()):
        default = parameters[name].default
        if values.get(name, default) is not default:
            raise TypeError(
                f"{flax_layer.__module__} has an argument {name} that this version of "
                f"bn_jax does not know; leave it out, or use Flax's own layer."
            )
    check_choices(layer.activation, layer.single_value)
    if layer.virtual_batch_size is not None:
        if layer.axis_name is not None or layer.axis_index_groups is not None:
            raise ValueError(
                "virtual_batch_size and axis_name were both given; the moments of "
                "virtual batches stay on their device. Leave axis_name out, and "
                "average batch_stats over devices with jax.lax.pmean."
            )
        if layer.renormalisation is not None:
            raise _both_kinds_of_small_batches()


def apply_module(
    layer: Any,
    params: BatchNormParams,
    stats: Statistics,
    x: ArrayLike,
    *,
    train: bool,
    mask: ArrayLike | None,
    weights: ArrayLike | None,
    renormalisation: Limits | None,
    looking: bool,
) -> tuple[jax.Array, Statistics]:
    """`batch_norm` as Flax's modules call it.

    Args:
      layer: the module, whose attributes say how to normalise.
      params: as `batch_norm` takes them.
      stats: as `batch_norm` takes them, but of any floating dtype.
      x: any rank; whole numbers are converted.
      train: normalise by the batch.
      mask: True (or not 0) for values that count; broadcastable to x.
      weights: as `batch_norm` takes them; instead of a mask.
      renormalisation: r_max and d_max of `batch_renorm`, before those of the layer.
      looking: for variables or shapes: outside any map over devices, and perhaps at
        one example, which is then normalised by the statistics.

    Returns:
      y, and the new statistics in the old ones' dtype.

    Raises:
      ValueError: mask and weights are both given, the mask does not broadcast, dtype
        is not floating point, or virtual batches are to be renormalised; and what
        `batch_norm` raises.
    """
    x = jnp.asarray(x)
    if mask is not None and weights is not None:
        raise ValueError(
            "mask and weights were both given; a mask is weights of 0 and 1: pass "
            "weights alone, multiplied by the mask."
        )
    if mask is not None:
        weights = _as_weights(jnp.asarray(mask, bool), x.shape)
    sharing = {
        "axis_name": layer.axis_name,
        "axis_index_groups": layer.axis_index_groups,
    }
    transform: Callable[..., Any] = functools.partial(batch_norm, **sharing)
    renormalisation = renormalisation or layer.renormalisation
    if looking:
        transform = batch_norm
        several = make_layout(x.shape, layer.axis).num_positions > 1
        train = train and (several or layer.single_value == "bias")
    elif layer.virtual_batch_size is not None:
        if renormalisation is not None:
            raise _both_kinds_of_small_batches()
        transform = functools.partial(
            ghost_batch_norm, virtual_batch_size=layer.virtual_batch_size
        )
    # Every layer normalises by its own batch while a population is gathered.
    elif renormalisation is not None and not isinstance(stats, PopulationMoments):
        r_max, d_max = renormalisation
        transform = functools.partial(batch_renorm, r_max=r_max, d_max=d_max, **sharing)
    # Flax promotes, whatever JAX is told about implicit promotion.
    with jax.numpy_dtype_promotion("standard"):
        result = _result_dtype(x, params, layer.dtype)
        exact = x.dtype if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.float32
        # In the wider dtype, so that the statistics are of x before it is rounded.
        x = x.astype(jnp.promote_types(exact, result))
        wide = jax.tree.map(
            lambda stat: stat.astype(jnp.promote_types(stat.dtype, jnp.float32)), stats
        )
    y, new = transform(
        params,
        wide,
        x,
        train=train,
        axis=layer.axis,
        decay=layer.momentum,
        eps=layer.epsilon,
        weights=weights,
        activation=layer.activation,
        unbiased=layer.unbiased,
        single_value=layer.single_value,
        skip_nonfinite=layer.skip_nonfinite,
    )
    kept = jax.tree.map(lambda stat, old: stat.astype(old.dtype), new, stats)
    return y.astype(result), kept


def _both_kinds_of_small_batches() -> ValueError:
    return ValueError(
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
