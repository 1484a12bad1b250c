"""Folding batch normalisation into the layers of a whole Flax nnx model."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from flax import nnx

from bn_jax.folding import fold_conv, fold_dense
from bn_jax.folding_trace import Finding, Trace, check_inference
from bn_jax.params import BatchNormParams
from bn_jax.statistics import BatchStats

# Layers that a normalisation folds into, and their parameter whose last axis is that of
# the output's features. Layers are linear in it, and have a `bias`, which may be None.
LAYERS: Mapping[type[nnx.Module], str] = {
    nnx.Linear: "kernel",
    nnx.Conv: "kernel",
    nnx.ConvTranspose: "kernel",
}


class FoldedBatchNorm(nnx.Module):
    """What stands in the place of a normalisation that is folded into a layer."""

    def __init__(self, activation: str | None = None) -> None:
        self.activation = activation  # None, or "relu"

    def __call__(self, x: jax.Array, *_: Any, **__: Any) -> jax.Array:
        """Returns x, after the activation."""
        return nnx.relu(x) if self.activation == "relu" else x


class Folded(NamedTuple):
    """A model with normalisations folded in, and a report."""

    model: Any
    report: tuple[Finding, ...]  # one each, in the order of the model's calls


def fold_batch_norms(
    model: nnx.Module,
    *args: Any,
    layers: Mapping[type[nnx.Module], str] = LAYERS,
    **kwargs: Any,
) -> Folded:
    """Folds each normalisation into the layer whose output goes straight into it.

    The model is traced once, as `model(*args, **kwargs)` at inference; call
    `model.eval()` first, or pass what makes it so. A normalisation folds where its
    input is a layer's output that is used nowhere else, both are called once, and it
    has one mean and variance for each feature, along the last axis. The report says of
    every other one why it stays.

    Args:
      model: with `flax.nnx.BatchNorm` or `bn_jax.nnx.BatchNorm` modules. It stays as it
        is.
      *args: what to call it on: arrays, closed over.
      layers: types of layers to fold into, and the name of the parameter whose last
        axis is that of features.
      **kwargs: also passed to the model.

    Returns:
      A copy in which folded normalisations are `FoldedBatchNorm`, without variables,
      and their layers have other kernels and biases; and the report.

    Raises:
      ValueError: a normalisation trains in this call.
    """
    trace = Trace()
    marked = nnx.clone(model)
    for path, module in list(nnx.iter_modules(marked)):
        if isinstance(module, nnx.BatchNorm):
            _mark_norm(trace, _name(path), module)
        elif type(module) in layers:
            _mark_layer(trace, _name(path), module, layers[type(module)])
    graph, state = nnx.split(marked)

    def run(state: Any) -> Any:
        return nnx.merge(graph, state)(*args, **kwargs)

    jaxpr = jax.make_jaxpr(run)(state).jaxpr
    folded = nnx.clone(model)
    modules: dict[str, Any] = {
        _name(path): module for path, module in nnx.iter_modules(folded)
    }
    shapes = {
        name: getattr(module, layers[type(module)]).shape
        for name, module in modules.items()
        if type(module) in layers
    }
    report = trace.findings(jaxpr, shapes)
    for norm, layer, _ in report:
        if layer is not None:
            module = modules[layer]
            _fold_one(modules[norm], module, layers[type(module)])
            activation = getattr(modules[norm], "activation", None)
            _replace(folded, modules[norm], FoldedBatchNorm(activation))
    return Folded(folded, report)


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))


def _mark_norm(trace: Trace, name: str, norm: nnx.BatchNorm) -> None:
    original: Any = type(norm)

    def call_marked(self: Any, x: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        given = dict(zip(("use_running_average",), args, strict=False)) | kwargs
        check_inference(name, self, given.get("use_running_average"))
        call = functools.partial(original.__call__, self)
        return trace.norm(name, call, x, self.axis, given)

    _replace_call(norm, call_marked)


def _mark_layer(trace: Trace, name: str, layer: nnx.Module, kernel: str) -> None:
    original: Any = type(layer)

    def call_marked(self: Any, *args: Any, **kwargs: Any) -> jax.Array:
        y = original.__call__(self, *args, **kwargs)
        transposed = getattr(self, "transpose_kernel", False)
        return trace.layer(name, y, getattr(self, kernel)[...], transposed)

    _replace_call(layer, call_marked)


def _replace_call(module: Any, call: Callable[..., jax.Array]) -> None:
    # Calls are looked up in the class: this one module gets a class of its own.
    own = type(module)
    module.__class__ = type(own.__name__, (own,), {"__call__": call})


def _fold_one(norm: Any, layer: Any, kernel: str) -> None:
    """Moves a normalisation's numbers into its layer's variables."""

    def value(variable: Any) -> Any:
        return None if variable is None else variable[...]

    params = BatchNormParams(value(norm.scale), value(norm.bias))
    stats = BatchStats(norm.mean[...], norm.var[...])
    old = getattr(layer, kernel)
    fold = fold_dense if old.ndim == 2 else fold_conv
    new_kernel, new_bias = fold(
        old[...], value(layer.bias), params, stats, eps=norm.epsilon
    )
    old[...] = new_kernel
    layer.bias = nnx.Param(new_bias)
    layer.use_bias = True  # which `nnx.Conv` looks at, too


def _replace(model: nnx.Module, old: Any, new: nnx.Module) -> None:
    """Puts another module in the place of one, wherever the model refers to it."""
    for _, parent in list(nnx.iter_modules(model)):
        for name, child in list(vars(parent).items()):
            if child is old:
                setattr(parent, name, new)
