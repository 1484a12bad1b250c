"""Checks of arguments, at trace time: what was got, what was expected, what to do."""

import math
import numbers
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from bn_jax import collectives
from bn_jax.activations import ActivationName
from bn_jax.collectives import AxisIndexGroups, AxisName, Groups
from bn_jax.layout import Layout, make_layout
from bn_jax.moments import check_weights
from bn_jax.params import BatchNormParams
from bn_jax.statistics import AnyStats, MicroBatchStats, PopulationMoments


class Options(NamedTuple):
    """What the transform needs to know before it sees a value."""

    feature_axes: tuple[int, ...]
    eps: float
    activation: ActivationName | None
    axis_name: AxisName | None
    groups: Groups | None
    unbiased: bool
    skip_nonfinite: bool


class Call(NamedTuple):
    """A call of the transform whose arguments have been checked."""

    options: Options
    params: BatchNormParams
    stats: Any
    x: jax.Array
    weights: jax.Array | None
    decay: ArrayLike

    @property
    def layout(self) -> Layout:
        """How x's axes are used."""
        return make_layout(self.x.shape, self.options.feature_axes)


def check(
    params: BatchNormParams,
    stats: AnyStats,
    x: ArrayLike,
    *,
    train: bool,
    gathering: tuple[type, ...] = (PopulationMoments, MicroBatchStats),
    axis: int | Sequence[int],
    decay: ArrayLike,
    eps: float,
    weights: ArrayLike | None,
    axis_name: AxisName | None = None,
    axis_index_groups: AxisIndexGroups | None = None,
    activation: ActivationName | None,
    unbiased: bool,
    skip_nonfinite: bool,
    single_value: Literal["error", "bias"] = "error",
) -> Call:
    """Checks what `bn_jax.batch_norm` takes, and makes arrays of what is like one.

    `gathering` are types of statistics that are welcome in training, beside
    `BatchStats`.
    """
    check_eps(eps)
    _check_decay(decay)
    check_choices(activation, single_value)
    x = jnp.asarray(x)
    layout = make_layout(x.shape, axis)
    checked_weights = check_weights(x, weights)
    check_types(params, stats, gathering if train else (MicroBatchStats,))
    params, stats = jax.tree.map(jnp.asarray, (params, stats))
    source = f"x of shape {x.shape} along its feature axes {layout.feature_axes}"
    check_features(params, stats, layout.feature_shape, source)
    groups = collectives.check_groups(axis_name, axis_index_groups)
    options = Options(
        layout.feature_axes,
        float(eps),
        activation,
        axis_name,
        groups,
        bool(unbiased),
        bool(skip_nonfinite),
    )
    call = Call(options, params, stats, x, checked_weights, decay)
    if train:
        check_precision(stats)
        # Of micro-batches there are several.
        if single_value == "error" and not isinstance(stats, MicroBatchStats):
            num_devices = collectives.group_size(axis_name, groups)
            check_num_values(x, layout, num_devices)
    return call


def check_eps(eps: float) -> None:
    """Eps is a finite positive number."""
    if not isinstance(eps, numbers.Real | np.number):
        raise TypeError(
            f"eps must be a number known when tracing, got {type(eps).__name__}; pass "
            "a Python float."
        )
    if not 0 < eps < math.inf:
        raise ValueError(f"eps must be positive, got {eps}; 1e-5 is usual.")


def _check_decay(decay: ArrayLike) -> None:
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


def check_choices(activation: str | None, single_value: str) -> None:
    """Arguments that are one of a few words are one of them."""
    activations = (None, *get_args(ActivationName))
    if activation not in activations:
        raise ValueError(
            f"activation must be one of {activations}, got {activation!r}; apply "
            "others to the output."
        )
    if single_value not in ("error", "bias"):
        raise ValueError(
            f"single_value must be 'error' or 'bias', got {single_value!r}."
        )


def check_types(
    params: BatchNormParams,
    stats: AnyStats,
    gathering: tuple[type, ...] = (),
) -> None:
    """Parameters and statistics are there and are what they should be.

    Args:
      params: scale and bias.
      stats: of inference, or such as gather batches.
      gathering: types of the latter that are welcome.
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
    if isinstance(stats, PopulationMoments) and PopulationMoments not in gathering:
        raise TypeError(
            "stats are PopulationMoments, which only training adds batches to; for "
            "inference make BatchStats of them with bn_jax.population.finalize."
        )
    if isinstance(stats, MicroBatchStats) and MicroBatchStats not in gathering:
        raise TypeError(
            "stats are MicroBatchStats, which batch_norm alone can train with: "
            "accumulate_gradients normalises by the moments of the whole batch, ghost "
            "batches and renormalisation do not. Leave those out, or accumulate the "
            "gradients of separate micro-batches."
        )


def check_features(
    params: BatchNormParams,
    stats: AnyStats,
    feature_shape: tuple[int, ...],
    source: str,
) -> None:
    """Parameters and statistics are floating point and as long as `source` says."""
    named = {f"params.{name}": value for name, value in params._asdict().items()}
    named |= {"stats.mean": stats.mean, "stats.var": stats.var}
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


def check_precision(stats: AnyStats) -> None:
    """Statistics can take small steps."""
    for name, value in (("mean", stats.mean), ("var", stats.var)):
        if jnp.finfo(value.dtype).bits < 32:
            raise TypeError(
                f"stats.{name} is {value.dtype}, too coarse for a moving average; keep "
                "statistics in float32, whatever the dtype of x."
            )


def check_num_values(x: jax.Array, layout: Layout, num_devices: int = 1) -> None:
    """Training has more than one value per feature."""
    if layout.num_positions * num_devices == 1:
        raise ValueError(
            f"training needs more than one value per feature, got x of shape {x.shape} "
            f"with feature axes {layout.feature_axes} on {num_devices} device(s): the "
            "output would be the bias whatever x is. Use a larger batch, share moments "
            "over devices with axis_name, pass train=False, or single_value='bias' to "
            "get the bias."
        )
