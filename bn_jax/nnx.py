"""Batch normalisation as a Flax nnx module: variables and defaults, no arithmetic."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import jax
from flax import nnx
from jax.typing import ArrayLike

from bn_jax import accumulation, population
from bn_jax.activations import ActivationName
from bn_jax.batch_norm import Limits
from bn_jax.drop_in import apply_module, check_constructor
from bn_jax.gathering import GATHERING
from bn_jax.params import BatchNormParams
from bn_jax.statistics import BatchStats

Values = tuple[Any, ...]


def keep_dtypes(values: Values, *, dtype: Any = None) -> Values:
    """Leaves input, statistics and parameters as they are: the core promotes."""
    del dtype
    return values


class Normalising(nnx.Module):
    """A module that keeps statistics, for the functions of this module to find."""

    mean: nnx.BatchStat[jax.Array]
    var: nnx.BatchStat[jax.Array]

    def read_statistics(self, train: bool) -> Any:
        """The running statistics, or in training those that gather in their place.

        Raises:
          ValueError: they have no values.
        """
        stats = BatchStats(self.mean.get_value(), self.var.get_value())
        for name, value in stats._asdict().items():
            if isinstance(value, jax.ShapeDtypeStruct):
                raise ValueError(
                    f"the statistic {name} of a BatchNorm has a shape and no value; "
                    "restore nnx.BatchStat together with nnx.Param, both from a "
                    "trained model or a checkpoint."
                )
        gathering = getattr(self, GATHERING, None) if train else None
        return stats if gathering is None else gathering.get_value()

    def write_statistics(self, stats: Any) -> None:
        """Keeps what `read_statistics` gave in training, with a batch added."""
        if isinstance(stats, BatchStats):
            self.mean[...], self.var[...] = stats
        else:
            getattr(self, GATHERING).set_value(stats)


class BatchNorm(Normalising, nnx.BatchNorm):
    """`flax.nnx.BatchNorm` computed by `bn_jax.batch_norm`.

    Its variables are that class's: `scale` and `bias` are `nnx.Param`, `mean` and `var`
    are `nnx.BatchStat`. So a model changes one import, and states restore in both
    directions. docs/flax_modules.md lists what differs on purpose. The first of these
    is that the running variance is unbiased.
    """

    def __init__(
        self,
        num_features: int,
        *,
        activation: ActivationName | None = None,
        unbiased: bool = True,
        frozen: bool = False,
        virtual_batch_size: int | None = None,
        renormalisation: Limits | None = None,
        single_value: Literal["error", "bias"] = "error",
        skip_nonfinite: bool = False,
        promote_dtype: Any = keep_dtypes,
        **arguments: Any,
    ) -> None:
        """Makes the variables.

        Args:
          num_features: size of the feature axis.
          activation: fused into the transform: None, "relu", "relu6", "leaky_relu",
            "silu" or "gelu".
          unbiased: unbiased running variance, as the paper's Algorithm 2 has it. False
            for Flax's.
          frozen: normalise by the statistics in training, too, and leave them as they
            are; scale and bias still learn.
          virtual_batch_size: normalise by virtual batches of so many examples along
            axis 0; see `bn_jax.ghost_batch_norm`.
          renormalisation: limits (r_max, d_max) of batch renormalisation; see
            `bn_jax.batch_renorm`. Here or in the call, which goes first.
          single_value: "error", or "bias" as Flax has it; see `bn_jax.batch_norm`.
          skip_nonfinite: leave the statistics as they are after a batch that is not
            finite, for loss scaling; see `bn_jax.batch_norm`.
          promote_dtype: as in Flax, but by default no value loses precision before it
            is used. Flax's own default rounds statistics and parameters to `dtype`.
          **arguments: those of `flax.nnx.BatchNorm`, with its defaults:
            use_running_average, axis, momentum, epsilon, dtype, param_dtype, use_bias,
            use_scale, bias_init, scale_init, axis_name, axis_index_groups,
            use_fast_variance (of no effect: the variance is always the stable one),
            rngs, bias_metadata and scale_metadata.
        """
        super().__init__(num_features, promote_dtype=promote_dtype, **arguments)
        self.activation = activation
        self.unbiased = unbiased
        self.frozen = frozen
        self.virtual_batch_size = virtual_batch_size
        self.renormalisation = renormalisation
        self.single_value = single_value
        self.skip_nonfinite = skip_nonfinite
        check_constructor(self, nnx.BatchNorm, arguments)

    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        mask: ArrayLike | None = None,
        weights: ArrayLike | None = None,
        renormalisation: Limits | None = None,
    ) -> jax.Array:
        """Normalises x, and in training updates the statistics.

        Args:
          x: any rank, real.
          use_running_average: as the attribute of that name, before which it goes.
          mask: True for values that count, False for padding; broadcastable to x.
          weights: 0 for padding, or example weights, instead of a mask; see
            `bn_jax.batch_norm`.
          renormalisation: as the attribute of that name, before which it goes; may be
            traced.

        Returns:
          The normalised input, of x's shape; 0 where mask or weights are 0.

        Raises:
          ValueError: `use_running_average` is not given anywhere, the module holds no
            statistics, or an argument is bad.
        """
        if use_running_average is None:
            use_running_average = self.use_running_average
        if use_running_average is None:
            raise ValueError(
                "use_running_average is given neither to BatchNorm nor to its call; "
                "pass False to train, True for inference, or use model.train() and "
                "model.eval()."
            )
        train = not (use_running_average or self.frozen)
        stats = self.read_statistics(train)
        params = BatchNormParams(
            *(
                None if variable is None else variable[...]
                for variable in (self.scale, self.bias)
            )
        )
        mean, var = stats.mean, stats.var
        promoted = self.promote_dtype((x, mean, var, *params), dtype=self.dtype)
        x, mean, var, scale, bias = promoted
        if not train:  # Flax, too, promotes the statistics for inference alone.
            stats = BatchStats(mean, var)
        y, stats = apply_module(
            self,
            BatchNormParams(scale, bias),
            stats,
            x,
            train=train,
            mask=mask,
            weights=weights,
            renormalisation=renormalisation,
            # `nnx.tabulate` marks the modules that it only shows so.
            looking=hasattr(self, "_nnx_tabulate_id"),
        )
        if train:
            self.write_statistics(stats)
        return y


def population_statistics(
    run: Callable[[Any, Any], Any],
    model: nnx.Module,
    batches: Iterable[Any],
    *,
    pooled: bool = False,
    keep_unseen: bool = False,
) -> None:
    """Re-estimates a model's statistics over batches, in place (Algorithm 2).

    As `bn_jax.population_statistics`, for the layers of this module in a model, whose
    other variables `run` leaves alone.

    Args:
      run: called as run(model, batch) for each batch, for example a compiled
        nnx.jit(lambda model, x: model(x)). What it returns is dropped.
      model: in training mode, see `model.train()`.
      batches: what `run` takes; of any sizes.
      pooled: as if all batches were one; see `bn_jax.population.finalize`.
      keep_unseen: leave the statistics of layers that saw no batch as they are.

    Raises:
      ValueError: the model has no such layer, or layers saw no batch and keep_unseen is
        False.
    """
    layers = _layers(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no layer of bn_jax.nnx.BatchNorm; use it in "
            "the place of flax.nnx.BatchNorm."
        )
    old = {name: layer.read_statistics(train=False) for name, layer in layers.items()}
    gathered = population.init(old)
    for batch in batches:
        gathered = _gather(layers, gathered, run, model, batch)[1]
    if not keep_unseen:
        population.check_seen(gathered)
    _set_statistics(layers, population.finalize(gathered, old, pooled=pooled))


def accumulate_gradients(
    loss_function: Callable[[Any, Any], jax.Array],
    model: nnx.Module,
    micro_batches: Any,
) -> tuple[jax.Array, Any]:
    """Loss and gradients of a large batch, and its statistics, in place.

    As `bn_jax.accumulate_gradients`, for the layers of this module in a model. Whatever
    else the model changes as it runs, such as the state of random numbers, stays as it
    was before, for every micro-batch.

    Args:
      loss_function: called as loss_function(model, micro_batch); returns the
        micro-batch's part of the loss, a scalar.
      model: in training mode, see `model.train()`.
      micro_batches: a tree of arrays whose leading axis is that of the micro-batches.

    Returns:
      The loss and the gradients by `nnx.Param`, as `nnx.value_and_grad` would of the
      large batch.

    Raises:
      ValueError: as `bn_jax.accumulate_gradients`.
      TypeError: as `bn_jax.accumulate_gradients`.
    """
    graph, params, *others = nnx.split(model, nnx.Param, ...)

    def of_micro_batch(params: Any, stats: Any, micro_batch: Any) -> Any:
        model = nnx.merge(graph, params, *others, copy=True)
        return _gather(_layers(model), stats, loss_function, model, micro_batch)

    layers = _layers(model)
    old = {name: layer.read_statistics(train=False) for name, layer in layers.items()}
    (loss, new), grads = accumulation.accumulate_gradients(
        of_micro_batch, params, old, micro_batches
    )
    _set_statistics(layers, new)
    return loss, grads


def _layers(model: nnx.Module) -> dict[str, Normalising]:
    """The layers that keep statistics in a model, by their path."""
    return {
        "/".join(map(str, path)) or "the layer": module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, Normalising)
    }


def _gather(
    layers: Mapping[str, Normalising],
    stats: Mapping[str, Any],
    run: Callable[[Any, Any], Any],
    model: nnx.Module,
    batch: Any,
) -> tuple[Any, dict[str, Any]]:
    """What run(model, batch) returns, and what becomes of the layers' statistics."""
    try:
        for name, layer in layers.items():
            setattr(layer, GATHERING, nnx.BatchStat(stats[name]))
        result = run(model, batch)
        return result, {
            name: getattr(layer, GATHERING).get_value()
            for name, layer in layers.items()
        }
    finally:
        for layer in layers.values():
            if hasattr(layer, GATHERING):
                delattr(layer, GATHERING)


def _set_statistics(
    layers: Mapping[str, Normalising], stats: Mapping[str, BatchStats]
) -> None:
    for name, layer in layers.items():
        layer.write_statistics(stats[name])
