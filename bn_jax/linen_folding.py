"""Folding batch normalisation into the layers of a whole Flax linen model."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.core
import flax.linen as nn
import flax.traverse_util
import jax.numpy as jnp

from bn_jax import folding_check, linen
from bn_jax.activations import activation_of
from bn_jax.folding import fold_axes, inference_affine
from bn_jax.folding_program import Leaf, Path, paths
from bn_jax.folding_trace import (
    Finding,
    Fold,
    Trace,
    check_folded_call,
    computes_as,
    is_inference,
)
from bn_jax.params import BatchNormParams
from bn_jax.statistics import BatchStats

# The collection that says what is folded: "factor" of a normalisation, by which the
# features of its layer were multiplied, and "adds_bias" of a layer that had no bias.
FOLDED = "folded"

_NORMS = (nn.BatchNorm, linen.BatchNorm)

Variables = Mapping[str, Any]


class Folded(NamedTuple):
    """A model's variables with normalisations folded in, and a report."""

    variables: dict[str, Any]
    report: tuple[Finding, ...]  # one each, in the order of the model


def fold_batch_norms(
    model: nn.Module, variables: Variables, *args: Any, **kwargs: Any
) -> Folded:
    """Folds each normalisation into the layer before it, or else the one after it.

    The model is traced once, as `model.apply(variables, *args, **kwargs)` at inference,
    and never computed. A normalisation folds where its input is the output of a layer,
    or its output the input of one that pads nothing, and no more is made of either; its
    mean and variance are those of features along the last axis; and nothing else reads
    the kernel and the bias of that layer. A layer is what the trace shows as one: a
    product with a kernel, whatever the class of its module. The report says of every
    other normalisation why it stays. `check_folded` compares outputs.

    Run the result with `apply_folded`. Its `params` are also those of the same model
    written without the folded normalisations and with a bias in each of these layers.

    Args:
      model: with `flax.linen.BatchNorm` modules, or `bn_jax.linen.BatchNorm` ones.
      variables: its collections `params` and `batch_stats`, and any others. Boxes, as
        of `nn.with_partitioning`, stay, and new biases get boxes like their kernels'.
      *args: what to call it on: arrays, or `jax.ShapeDtypeStruct`s of their shapes.
      **kwargs: also passed to the model, such as train=False; not traced.

    Returns:
      New variables, where folded normalisations have neither parameters nor statistics,
      their layers have other kernels and biases, and a collection `folded` marks them.
      All leaves are arrays, but for boxes: save and restore them as any others.

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
    trace, eps = Trace("/"), dict[Path, float]()

    def run(variables: Variables, args: Sequence[Any]) -> Any:
        with nn.intercept_methods(functools.partial(_mark, trace, eps)):
            return model.apply(variables, *args, **kwargs)

    leaves = [Leaf(path[1:], path[0] == "params") for path in paths(variables)]
    program = trace.program(run, variables, leaves, args)
    flat = {
        name: flax.traverse_util.flatten_dict(collection)
        for name, collection in variables.items()
    }
    for path in flat["batch_stats"]:
        if path[-1] == "var" and (*path[:-1], "mean") in flat["batch_stats"]:
            trace.leave(path[:-1], "no BatchNorm is called there")
    flat[FOLDED] = {}
    findings = trace.findings(program)
    for _, fold in findings:
        if fold is not None:
            _fold_one(fold, eps[fold.norm], flat)
    return Folded(
        {
            name: flax.traverse_util.unflatten_dict(collection)
            for name, collection in flat.items()
        },
        tuple(finding for finding, _ in findings),
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
      ValueError: the variables are not folded, or a folded normalisation is to train or
        gets a mask.
    """
    if FOLDED not in variables:
        raise ValueError(
            f"variables have no collection {FOLDED!r}; make them with "
            "fold_batch_norms, or call model.apply."
        )
    # Looked up here: transformed modules need not see the collection.
    folded = set(flax.traverse_util.flatten_dict(flax.core.unfreeze(variables[FOLDED])))
    with nn.intercept_methods(functools.partial(_skip_folded, folded)):
        return model.apply(variables, *args, **kwargs)


def check_folded(
    model: nn.Module,
    variables: Variables,
    folded: Variables,
    *args: Any,
    tolerance: float | None = None,
    **kwargs: Any,
) -> float:
    """Compares a folded model's outputs with those of the model as it was trained.

    Args:
      model: as for `fold_batch_norms`.
      variables: as `fold_batch_norms` took them.
      folded: as it returned them.
      *args: a batch, as the model takes it.
      tolerance: the largest difference to accept, as a part of the largest value of its
        output; None for that of the coarsest dtype that the model computes in:
        1e-10 for float64, 1e-4 for float32, 1e-2 for float16 and 5e-2 for bfloat16.
      **kwargs: also passed to the model, such as train=False.

    Returns:
      The largest difference, as a part of the largest value of its output.

    Raises:
      ValueError: it is larger than the tolerance, or not finite.
    """
    return folding_check.check_same(
        functools.partial(model.apply, variables, *args, **kwargs),
        functools.partial(apply_folded, model, folded, *args, **kwargs),
        tolerance,
    )


def _mark(
    trace: Trace,
    eps: dict[Path, float],
    call: Callable[..., Any],
    args: Any,
    kwargs: Any,
    context: nn.module.InterceptorContext,
) -> Any:
    """Interceptor of methods that tells a trace of normalisations and other modules."""
    module: Any = context.module
    if context.method_name != "__call__":
        return call(*args, **kwargs)
    if not isinstance(module, nn.BatchNorm):
        return trace.module(module.path, module, call(*args, **kwargs))
    if not computes_as(module, _NORMS):
        trace.leave(module.path, f"{type(module).__name__} has a call of its own")
        return call(*args, **kwargs)
    eps[module.path] = module.epsilon
    given = _arguments(args, kwargs)
    return trace.norm(module.path, module, call, given.pop("x"), given)


def _skip_folded(
    folded: set[Path],
    call: Callable[..., Any],
    args: Any,
    kwargs: Any,
    context: nn.module.InterceptorContext,
) -> Any:
    """Interceptor of methods that gives layers what normalisations were."""
    module: Any = context.module
    if context.method_name != "__call__":
        return call(*args, **kwargs)
    if (*module.path, "factor") in folded:
        name, given = "/".join(module.path), _arguments(args, kwargs)
        check_folded_call(name, is_inference(module, given), given)
        activation = activation_of(getattr(module, "activation", None))
        return activation.apply(given["x"])
    y = call(*args, **kwargs)
    if (*module.path, "adds_bias") in folded:
        bias = nn.meta.unbox(module.get_variable("params", "bias"))
        y = y + jnp.expand_dims(bias, range(y.ndim - 1)).astype(y.dtype)
    return y


def _arguments(args: Any, kwargs: Any) -> dict[str, Any]:
    return dict(zip(("x", "use_running_average"), args, strict=False)) | kwargs


def _fold_one(fold: Fold, eps: float, flat: dict[str, dict[Path, Any]]) -> None:
    """Moves a normalisation's variables into its layer's."""

    def take(collection: str, name: str) -> Any:
        return nn.meta.unbox(flat[collection].pop((*fold.norm, name), None))

    params = BatchNormParams(take("params", "scale"), take("params", "bias"))
    stats = BatchStats(take("batch_stats", "mean"), take("batch_stats", "var"))
    kernel = flat["params"][fold.kernel]
    bias = flat["params"].get(fold.bias)
    new_kernel, new_bias = fold_axes(
        nn.meta.unbox(kernel),
        nn.meta.unbox(bias),
        params,
        stats,
        eps=eps,
        inputs=fold.inputs,
        outputs=fold.outputs,
    )
    flat["params"][fold.kernel] = nn.meta.replace_boxed(kernel, new_kernel)
    if bias is None:
        flat[FOLDED][*fold.bias[:-1], "adds_bias"] = jnp.ones((), bool)
        bias = new_bias
        if names := getattr(kernel, "names", None):  # of the axes of a box
            bias = kernel.replace(names=names[fold.outputs : fold.outputs + 1])
    flat["params"][fold.bias] = nn.meta.replace_boxed(bias, new_bias)
    factor, _ = inference_affine(params, stats, eps=eps)
    flat[FOLDED][*fold.norm, "factor"] = factor
