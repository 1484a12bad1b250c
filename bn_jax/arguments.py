"""Checks of arguments, at trace time: what was got, what was expected, what to do."""

import math
import numbers

import jax
import jax.numpy as jnp
import numpy as np

from bn_jax.layout import Layout
from bn_jax.params import BatchNormParams
from bn_jax.statistics import BatchStats, MicroBatchStats, PopulationMoments

ACTIVATIONS = (None, "relu")


def check_eps(eps: float) -> None:
    """Eps is a finite positive number."""
    if not isinstance(eps, numbers.Real | np.number):
        raise TypeError(
            f"eps must be a number known when tracing, got {type(eps).__name__}; pass "
            "a Python float."
        )
    if not 0 < eps < math.inf:
        raise ValueError(f"eps must be positive, got {eps}; 1e-3 is usual.")


def check_decay(decay: float | jax.Array) -> None:
    """A decay is within [0, 1], where its value is known when tracing."""
    if isinstance(decay, jax.core.Tracer):
        return
    # In NumPy: JAX would trace the comparison of a concrete array, too.
    value = np.asarray(decay)
    if not jnp.issubdtype(value.dtype, jnp.number):
        raise TypeError(
            f"decay must be a number, got {type(decay).__name__}; pass a float or a "
            "scalar array."
        )
    if not np.all((value >= 0) & (value <= 1)):
        raise ValueError(
            f"decay must be within [0, 1], got {decay}; the statistics become "
            "decay * old + (1 - decay) * batch."
        )


def check_activation(activation: str | None) -> None:
    """The activation is one that is fused."""
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation must be one of {ACTIVATIONS}, got {activation!r}; apply "
            "others to the output."
        )


def check_types(
    params: BatchNormParams,
    stats: BatchStats | PopulationMoments | MicroBatchStats,
    gathering: bool = False,
) -> None:
    """Parameters and statistics are there and are what they should be.

    Args:
      params: scale and bias.
      stats: of inference, or such as gather batches.
      gathering: the latter are welcome.
    """
    if not (isinstance(params, tuple) and hasattr(params, "scale")):
        raise TypeError(
            "params must be BatchNormParams(scale, bias), got "
            f"{type(params).__name__}; make them with init_params(num_features)."
        )
    fields = stats if isinstance(stats, tuple) else (stats,)
    if any(field is None for field in fields):
        raise ValueError(
            f"stats are missing ({stats}); restore them with the parameters, or start "
            "with init_stats(num_features)."
        )
    if not (isinstance(stats, tuple) and hasattr(stats, "var")):
        raise TypeError(
            f"stats must be BatchStats(mean, var), got {type(stats).__name__}; make "
            "them with init_stats(num_features)."
        )
    if isinstance(stats, PopulationMoments) and not gathering:
        raise TypeError(
            "stats are PopulationMoments, which only training adds batches to; for "
            "inference make BatchStats of them with bn_jax.population.finalize."
        )
    if isinstance(stats, MicroBatchStats):
        raise TypeError(
            "stats are MicroBatchStats, which batch_norm alone can train with: "
            "accumulate_gradients normalises by the moments of the whole batch, ghost "
            "batches and renormalisation do not. Leave those out, or accumulate the "
            "gradients of separate micro-batches."
        )


def check_features(
    params: BatchNormParams,
    stats: BatchStats | PopulationMoments,
    feature_shape: tuple[int, ...],
    source: str,
) -> None:
    """Parameters and statistics are floating point and as long as `source` says."""
    named = {f"params.{name}": value for name, value in params._asdict().items()}
    named |= {f"stats.{name}": value for name, value in stats._asdict().items()}
    for name, value in named.items():
        if value is None:
            continue
        if jnp.shape(value) != feature_shape:
            raise ValueError(
                f"{name} has shape {jnp.shape(value)}, but {source} has "
                f"{feature_shape}; make params and stats for that number of features, "
                "or pass another axis."
            )
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise TypeError(
                f"{name} must be floating point, got {value.dtype}; convert it first."
            )


def check_precision(stats: BatchStats | PopulationMoments) -> None:
    """Statistics can take small steps."""
    for name, value in stats._asdict().items():
        if jnp.finfo(value.dtype).bits < 32:
            raise TypeError(
                f"stats.{name} is {value.dtype}, too coarse for a moving average; keep "
                "statistics in float32, whatever the dtype of x."
            )


def check_num_values(x: jax.Array, layout: Layout, num_devices: int) -> None:
    """Training has more than one value per feature."""
    if layout.num_positions * num_devices == 1:
        raise ValueError(
            f"training needs more than one value per feature, got x of shape {x.shape} "
            f"with feature axes {layout.feature_axes} on {num_devices} device(s): the "
            "output would be the bias whatever x is. Use a larger batch, share moments "
            "over devices with axis_name, or pass train=False."
        )
