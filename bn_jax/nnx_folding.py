"""Folding batch normalisation into the layers of a whole Flax nnx model."""

import collections
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx

import bn_jax.nnx
from bn_jax import folding_check
from bn_jax.activations import ActivationName, activation_of
from bn_jax.folding import fold_axes
from bn_jax.folding_program import Leaf, Path, paths
from bn_jax.folding_trace import (
    Finding,
    Fold,
    Trace,
    check_folded_call,
    computes_as,
)
from bn_jax.params import BatchNormParams
from bn_jax.statistics import BatchStats

_NORMS = (nnx.BatchNorm, bn_jax.nnx.BatchNorm)
_TAKE_BIAS = (nnx.Linear, nnx.Conv, nnx.ConvTranspose)  # add a bias if they get one


class FoldedBatchNorm(nnx.Module):
    """What stands in the place of a normalisation that is folded into a layer."""

    def __init__(self, activation: ActivationName | None = None) -> None:
        self.activation = activation  # as of the normalisation, by name

    def __call__(
        self, x: jax.Array, use_running_average: bool = True, **given: Any
    ) -> jax.Array:
        """Returns x, after the activation.

        Raises:
          ValueError: it is to train, or gets a mask or weights.
        """
        check_folded_call("a normalisation", use_running_average, given)
        return activation_of(self.activation).apply(x)


class Folded(NamedTuple):
    """A model with normalisations folded in, and a report."""

    model: Any
    report: tuple[Finding, ...]  # one each, in the order of the model's calls


def fold_batch_norms(model: nnx.Module, *args: Any, **kwargs: Any) -> Folded:
    """Folds each normalisation into the layer before it, or else the one after it.

    The model is traced once, as `model(*args, **kwargs)` at inference; call
    `model.eval()` first, or pass what makes it so. A normalisation folds where its
    input is the output of a layer, or its output the input of one that pads nothing,
    and no more is made of either; its mean and variance are those of features along the
    last axis; and nothing else reads or holds the kernel and the bias of that layer. A
    layer is what the trace shows as one: a product with a kernel, whatever the class of
    its module. The report says of every other normalisation why it stays.
    `check_folded` compares outputs.

    Args:
      model: with `flax.nnx.BatchNorm` or `bn_jax.nnx.BatchNorm` modules, in attributes
        or any containers. It stays as it is.
      *args: what to call it on: arrays, or `jax.ShapeDtypeStruct`s of their shapes.
      **kwargs: also passed to the model; not traced.

    Returns:
      A copy in which folded normalisations are `FoldedBatchNorm`, without variables,
      and their layers have other kernels and biases; and the report.

    Raises:
      ValueError: a normalisation trains in this call.
    """
    trace, marked = Trace("."), nnx.clone(model)
    for path, module in list(nnx.iter_modules(marked)):
        if computes_as(module, _NORMS):
            _mark(module, functools.partial(_call_norm, trace, path))
        elif computes_as(module, _TAKE_BIAS):
            _mark(module, functools.partial(_call_layer, trace, path))
    graph, state = nnx.split(marked)
    variables, places = dict(nnx.to_flat_state(state)), _places(marked)
    leaves = [
        Leaf(
            path, hasattr(variables[path], "set_value"), places[id(variables[path])] > 1
        )
        for path in paths(state)
    ]

    def run(state: Any, args: Sequence[Any]) -> Any:
        return nnx.merge(graph, state)(*args, **kwargs)

    program = trace.program(run, state, leaves, args)
    folded = nnx.clone(model)
    modules: dict[Path, Any] = dict(nnx.iter_modules(folded))
    for path, module in modules.items():
        if computes_as(module, _NORMS):
            trace.leave(path, "no call reaches it")
        elif isinstance(module, nnx.BatchNorm):
            trace.leave(path, f"{type(module).__name__} has a call of its own")
    findings = trace.findings(program)
    variables = dict(nnx.to_flat_state(nnx.state(folded)))
    for _, fold in findings:
        if fold is not None:
            _fold_one(fold, modules, variables)
    return Folded(folded, tuple(finding for finding, _ in findings))


def check_folded(
    model: nnx.Module,
    folded: nnx.Module,
    *args: Any,
    tolerance: float | None = None,
    **kwargs: Any,
) -> float:
    """Compares a folded model's outputs with those of the model as it was trained.

    Args:
      model: as for `fold_batch_norms`. It stays as it is, and so does the folded one.
      folded: as that returned it.
      *args: a batch, as the model takes it.
      tolerance: the largest difference to accept, as a part of the largest value of its
        output; None for that of the coarsest dtype that the model computes in:
        1e-10 for float64, 1e-4 for float32, 1e-2 for float16 and 5e-2 for bfloat16.
      **kwargs: also passed to the model.

    Returns:
      The largest difference, as a part of the largest value of its output.

    Raises:
      ValueError: it is larger than the tolerance, or not finite.
    """

    def run(model: Any) -> Any:
        return nnx.clone(model)(*args, **kwargs)

    return folding_check.check_same(
        functools.partial(run, model), functools.partial(run, folded), tolerance
    )


def _places(model: nnx.Module) -> collections.Counter[int]:
    """How many places of a model hold each of its variables, by identity."""
    return collections.Counter(
        id(leaf)
        for _, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Pytree)
        for leaf in jax.tree.leaves(
            vars(node), is_leaf=lambda leaf: isinstance(leaf, nnx.Pytree | nnx.Variable)
        )
        if isinstance(leaf, nnx.Variable)
    )


def _call_norm(
    trace: Trace, path: Path, self: Any, call: Any, x: jax.Array, *args: Any, **kw: Any
) -> jax.Array:
    given = dict(zip(("use_running_average",), args, strict=False)) | kw
    return trace.norm(path, self, call, x, given)


def _call_layer(
    trace: Trace, path: Path, self: Any, call: Any, *args: Any, **kwargs: Any
) -> Any:
    return trace.module(path, self, call(*args, **kwargs))


def _mark(module: Any, marked: Callable[..., Any]) -> None:
    own = type(module)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return marked(self, functools.partial(own.__call__, self), *args, **kwargs)

    # Calls are looked up in the class: this one module gets a class of its own.
    module.__class__ = type(own.__name__, (own,), {"__call__": call})


def _fold_one(
    fold: Fold, modules: dict[Path, Any], variables: dict[Path, nnx.Variable[Any]]
) -> None:
    """Moves a normalisation's numbers into its layer's variables."""

    def value(variable: Any) -> Any:
        return None if variable is None else variable.get_value()

    norm = modules[fold.norm]
    params = BatchNormParams(value(norm.scale), value(norm.bias))
    stats = BatchStats(value(norm.mean), value(norm.var))
    kernel, bias = variables[fold.kernel], variables.get(fold.bias)
    new_kernel, new_bias = fold_axes(
        value(kernel),
        value(bias),
        params,
        stats,
        eps=norm.epsilon,
        inputs=fold.inputs,
        outputs=fold.outputs,
    )
    kernel.set_value(new_kernel)
    if bias is None:
        layer = modules[fold.bias[:-1]]
        bias = variables[fold.bias] = layer.bias = nnx.Param(new_bias)
        layer.use_bias = True  # which `nnx.Conv` looks at, too
        names = kernel.get_metadata().get("out_sharding")
        if isinstance(names, tuple | jax.sharding.PartitionSpec):
            bias.set_metadata(out_sharding=names[fold.outputs : fold.outputs + 1])
    bias.set_value(new_bias)
    # In place, so that whatever holds the normalisation holds what it becomes.
    stand_in = FoldedBatchNorm(getattr(norm, "activation", None))
    norm.__class__ = FoldedBatchNorm
    vars(norm).clear()
    vars(norm).update(vars(stand_in))
