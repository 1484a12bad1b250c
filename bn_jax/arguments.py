"""Checks of arguments, at trace time: what was got, what was expected, what to do."""

import math
import numbers

import jax
import jax.numpy as jnp
import numpy as np

from bn_jax.layout import Layout
from bn_jax.params import BatchNormParams
from bn_jax.statistics import BatchStats

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


def check_params(params: BatchNormParams, x: jax.Array, layout: Layout) -> None:
    """Scale and bias fit the features of x."""
    if not (isinstance(params, tuple) and hasattr(params, "scale")):
        raise TypeError(
            "params must be BatchNormParams(scale, bias), got "
            f"{type(params).__name__}; make them with init_params(num_features)."
        )
    for name, value in params._asdict().items():
        if value is not None:
            _check_feature_shape(f"params.{name}", value, x, layout)


def check_stats(
    stats: BatchStats, x: jax.Array, layout: Layout, *, train: bool
) -> None:
    """Statistics are there, fit the features of x, and are precise enough to update."""
    if stats is None:
        raise ValueError(
            "stats are missing (None); restore them with the parameters, or start with "
            "init_stats(num_features)."
        )
    if not (isinstance(stats, tuple) and hasattr(stats, "var")):
        raise TypeError(
            f"stats must be BatchStats(mean, var), got {type(stats).__name__}; make "
            "them with init_stats(num_features)."
        )
    for name, value in stats._asdict().items():
        _check_feature_shape(f"stats.{name}", value, x, layout)
        if train and jnp.finfo(value.dtype).bits < 32:
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


def _check_feature_shape(
    name: str, value: jax.Array, x: jax.Array, layout: Layout
) -> None:
    if jnp.shape(value) != layout.feature_shape:
        raise ValueError(
            f"{name} has shape {jnp.shape(value)}, but x of shape {x.shape} has "
            f"features of shape {layout.feature_shape} along axes "
            f"{layout.feature_axes}; make params and stats for that number of "
            "features, or pass another axis."
        )
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(f"{name} must be floating point, got {value.dtype}.")
