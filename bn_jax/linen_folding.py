"""Folding batch normalisation into the layers of a whole Flax linen model."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.core
import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp

from bn_jax.folding import fold_conv, fold_dense, inference_affine
from bn_jax.folding_trace import Finding, Trace, check_inference
from bn_jax.params import BatchNormParams
from bn_jax.statistics import BatchStats

# Layers that a normalisation folds into, and their parameter whose last axis is that of
# the output's features. Layers are linear in it, and their bias, if any, is "bias".
LAYERS: Mapping[type[nn.Module], str] = {
    nn.Dense: "kernel",
    nn.Conv: "kernel",
    nn.ConvTranspose: "kernel",
}

# The collection that says what is folded: "factor" of a normalisation, by which the
# features of its layer were multiplied, and "adds_bias" of a layer that had no bias.
FOLDED = "folded"

Variables = Mapping[str, Any]
Path = tuple[str, ...]


class Folded(NamedTuple):
    """A model's variables with normalisations folded in, and a report."""

    variables: dict[str, Any]
    report: tuple[Finding, ...]  # one each, in the order of the model


def fold_batch_norms(
    model: nn.Module,
    variables: Variables,
    *args: Any,
    layers: Mapping[type[nn.Module], str] = LAYERS,
    **kwargs: Any,
) -> Folded:
    """Folds each normalisation into the layer whose output goes straight into it.

    The model is traced once, as `model.apply(variables, *args, **kwargs)` at inference,
    and never computed. A normalisation folds where its input is a layer's output that
    is used nowhere else, both are called once, and it has one mean and variance for
    each feature, along the last axis. The report says of every other one why it stays.

    Run the result with `apply_folded`. Its `params` are also those of the same model
    written without the folded normalisations and with a bias in each of these layers.

    Args:
      model: with `flax.linen.BatchNorm` modules, or `bn_jax.linen.BatchNorm` ones.
      variables: its collections `params` and `batch_stats`, and any others.
      *args: what to call it on: arrays, or `jax.ShapeDtypeStruct`s of their shapes.
      layers: types of layers to fold into, and the name of the parameter whose last
        axis is that of features; `LAYERS | {SeparableConv: "pointwise_kernel"}` adds
        one of your own.
      **kwargs: also passed to the model, such as train=False; not traced.

    Returns:
      New variables, where folded normalisations have neither parameters nor statistics,
      their layers have other kernels and biases, and a collection `folded` marks them.
      All leaves are arrays: save and restore them as any others.

    Raises:
      ValueError: the variables lack `batch_stats`, are folded already, or a
        normalisation trains in this call.
    """
    variables = flax.core.unfreeze(dict(variables))
    if FOLDED in variables:
        raise ValueError(
            "variables are folded already; fold those of the trained model instead."
        )
    if "batch_stats" not in variables:
        raise ValueError(
            "variables hold no batch_stats; pass {'params': ..., 'batch_stats': ...}, "
            "both from the trained model."
        )
    trace, modules = Trace(), dict[str, nn.Module]()
    leaves, structure = jax.tree.flatten(args)
    is_array = [hasattr(leaf, "shape") for leaf in leaves]

    def run(variables: Variables, arrays: list[Any]) -> Any:
        rest = iter(arrays)
        merged = [
            next(rest) if traced else leaf
            for leaf, traced in zip(leaves, is_array, strict=True)
        ]
        mark = functools.partial(_mark, trace, modules, layers)
        with nn.intercept_methods(mark):
            return model.apply(
                variables, *jax.tree.unflatten(structure, merged), **kwargs
            )

    arrays = [leaf for leaf, traced in zip(leaves, is_array, strict=True) if traced]
    jaxpr = jax.make_jaxpr(run)(variables, arrays).jaxpr
    flat = {
        name: flax.traverse_util.flatten_dict(collection)
        for name, collection in variables.items()
    }
    flat[FOLDED] = {}
    kernels = {
        name: (*module.path, layers[type(module)])
        for name, module in modules.items()
        if type(module) in layers
    }
    shapes = {
        name: flat["params"][path].shape
        for name, path in kernels.items()
        if path in flat["params"]
    }
    report = trace.findings(jaxpr, shapes)
    for norm, layer, _ in report:
        if layer is not None:
            _fold_one(modules[norm], kernels[layer], flat)
    return Folded(
        {
            name: flax.traverse_util.unflatten_dict(collection)
            for name, collection in flat.items()
        },
        report,
    )


def apply_folded(
    model: nn.Module, variables: Variables, *args: Any, **kwargs: Any
) -> Any:
    """`model.apply` for variables from `fold_batch_norms`.

    Folded normalisations return their input (after their fused activation, if they
    have one), and layers without a bias add the one that was folded into them. Of the
    normalisations' arithmetic nothing is left in the compiled program.

    Args:
      model: the model that the variables were folded for.
      variables: as `fold_batch_norms` returns them.
      *args: as of `model.apply`.
      **kwargs: as of `model.apply`.

    Returns:
      What `model.apply` returns.

    Raises:
      ValueError: the variables are not folded.
    """
    if FOLDED not in variables:
        raise ValueError(
            f"variables have no collection {FOLDED!r}; make them with "
            "fold_batch_norms, or call model.apply."
        )
    with nn.intercept_methods(_skip_folded):
        return model.apply(variables, *args, **kwargs)


def _skip_folded(
    call: Callable[..., Any],
    args: Any,
    kwargs: Any,
    context: nn.module.InterceptorContext,
) -> Any:
    module = context.module
    if context.method_name != "__call__":
        return call(*args, **kwargs)
    if isinstance(module, nn.BatchNorm) and module.has_variable(FOLDED, "factor"):
        x = kwargs["x"] if "x" in kwargs else args[0]
        return nn.relu(x) if getattr(module, "activation", None) == "relu" else x
    y = call(*args, **kwargs)
    if module.has_variable(FOLDED, "adds_bias"):
        y = y + module.get_variable("params", "bias").astype(y.dtype)
    return y


def _mark(
    trace: Trace,
    modules: dict[str, nn.Module],
    layers: Mapping[type[nn.Module], str],
    call: Callable[..., Any],
    args: Any,
    kwargs: Any,
    context: nn.module.InterceptorContext,
) -> Any:
    """Interceptor of methods that tells a trace of layers and normalisations."""
    module: Any = context.module
    if context.method_name != "__call__":
        return call(*args, **kwargs)
    name = "/".join(module.path)
    if isinstance(module, nn.BatchNorm):
        modules[name] = module
        given = dict(zip(("x", "use_running_average"), args, strict=False)) | kwargs
        check_inference(name, module, given.get("use_running_average"))
        return trace.norm(name, call, given.pop("x"), module.axis, given)
    y = call(*args, **kwargs)
    # A class that is derived from a layer's may compute anything.
    kernel = layers.get(type(module))
    if kernel is None or not module.has_variable("params", kernel):
        return y
    modules[name] = module
    transposed = getattr(module, "transpose_kernel", False)
    return trace.layer(name, y, module.get_variable("params", kernel), transposed)


def _fold_one(norm: Any, kernel_path: Path, flat: dict[str, dict[Path, Any]]) -> None:
    """Moves a normalisation's variables into its layer's."""

    def take(collection: str, name: str) -> Any:
        return flat[collection].pop((*norm.path, name), None)

    layer_path = kernel_path[:-1]
    params = BatchNormParams(take("params", "scale"), take("params", "bias"))
    stats = BatchStats(take("batch_stats", "mean"), take("batch_stats", "var"))
    kernel = flat["params"][kernel_path]
    bias = flat["params"].get((*layer_path, "bias"))
    fold = fold_dense if kernel.ndim == 2 else fold_conv
    new_kernel, new_bias = fold(kernel, bias, params, stats, eps=norm.epsilon)
    flat["params"][kernel_path] = new_kernel
    flat["params"][*layer_path, "bias"] = new_bias
    factor, _ = inference_affine(params, stats, eps=norm.epsilon)
    flat[FOLDED][*norm.path, "factor"] = factor
    if bias is None:
        flat[FOLDED][*layer_path, "adds_bias"] = jnp.ones((), bool)
