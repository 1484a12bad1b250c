"""Folding batch normalisation into the layers of a whole Flax linen model."""

import collections
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.core
import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from bn_jax.folding import fold_conv, fold_dense, inference_affine
from bn_jax.layout import make_layout
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


class Finding(NamedTuple):
    """What became of one normalisation of the model."""

    norm: str  # its path in the model
    layer: str | None  # the path of the layer that it is folded into
    reason: str | None  # why it is folded into none

    def __str__(self) -> str:
        if self.reason is None:
            return f"{self.norm}: folded into {self.layer}"
        return f"{self.norm}: not folded, since {self.reason}"


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
    trace = _Trace(layers)
    leaves, structure = jax.tree.flatten(args)
    is_array = [hasattr(leaf, "shape") for leaf in leaves]

    def run(variables: Variables, arrays: list[Any]) -> Any:
        rest = iter(arrays)
        merged = [
            next(rest) if traced else leaf
            for leaf, traced in zip(leaves, is_array, strict=True)
        ]
        with nn.intercept_methods(trace.mark):
            return model.apply(
                variables, *jax.tree.unflatten(structure, merged), **kwargs
            )

    arrays = [leaf for leaf, traced in zip(leaves, is_array, strict=True) if traced]
    marks = _Marks()
    marks.read(jax.make_jaxpr(run)(variables, arrays).jaxpr)
    flat = {
        name: flax.traverse_util.flatten_dict(collection)
        for name, collection in variables.items()
    }
    flat[FOLDED] = {}
    report = []
    for norm in trace.norms.values():
        layer, reason = _match(norm, trace.layers, marks, flat["params"])
        if layer is not None:
            _fold_one(norm, layer, flat)
        report.append(Finding(norm.name, layer and layer.name, reason))
    return Folded(
        {
            name: flax.traverse_util.unflatten_dict(collection)
            for name, collection in flat.items()
        },
        tuple(report),
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


class _Layer(NamedTuple):
    """A layer that was called, and its parameter to fold into."""

    name: str  # its path, as text
    module: nn.Module
    kernel: str
    kernel_shape: tuple[int, ...]


class _Norm(NamedTuple):
    """A normalisation that was called."""

    name: str  # its path, as text
    module: Any
    reason: str | None  # why it cannot be folded, whatever comes before it


class _Trace:
    """Watches a model's calls, and marks values so that its jaxpr tells of them."""

    def __init__(self, layers: Mapping[type[nn.Module], str]) -> None:
        self.kernels = layers
        self.layers: dict[str, _Layer] = {}
        self.norms: dict[str, _Norm] = {}

    def mark(
        self,
        call: Callable[..., Any],
        args: Any,
        kwargs: Any,
        context: nn.module.InterceptorContext,
    ) -> Any:
        """Interceptor of methods."""
        module = context.module
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        name = "/".join(module.path)
        if isinstance(module, nn.BatchNorm):
            given = dict(zip(("x", "use_running_average"), args, strict=False)) | kwargs
            _check_inference(module, name, given.get("use_running_average"))
            x = given.pop("x")
            y = call(checkpoint_name(x, _NORM + name), **given)
            self.norms[name] = _Norm(name, module, _own_reason(module, given, x, y))
            return y
        kernel = next((k for t, k in self.kernels.items() if isinstance(module, t)), "")
        y = call(*args, **kwargs)
        if not kernel or not module.has_variable("params", kernel):
            return y
        value = checkpoint_name(module.get_variable("params", kernel), _KERNEL + name)
        self.layers[name] = _Layer(name, module, kernel, value.shape)
        return checkpoint_name(y, _LAYER + name)


# What marks begin with, before the path of the module.
_NORM, _LAYER, _KERNEL = (f"bn_jax.folding/{n}/" for n in ("norm", "layer", "kernel"))


class _Marks:
    """What a jaxpr tells about marked values."""

    def __init__(self) -> None:
        self.calls: collections.Counter[str] = collections.Counter()
        self.computed: set[str] = set()  # marks of values that an operation made
        self.sources: dict[str, str] = {}  # the layer's mark that a norm's input has
        self.reasons: dict[str, str] = {}  # or why it has none

    def read(self, jaxpr: Any) -> None:
        """Reads a jaxpr and those within it."""
        makers = {variable: e for e in jaxpr.eqns for variable in e.outvars}
        uses = collections.Counter(
            variable
            for variables in (*(e.invars for e in jaxpr.eqns), jaxpr.outvars)
            for variable in variables
            if _is_variable(variable)
        )
        for equation in jaxpr.eqns:
            for inner in _inner_jaxprs(equation):
                self.read(inner)
            mark = _mark_of(equation)
            self.calls[mark] += 1
            if (
                mark
                and _is_variable(equation.invars[0])
                and equation.invars[0] in makers
            ):
                self.computed.add(mark)
            if mark.startswith(_NORM):
                self._trace_back(mark, equation.invars[0], makers, uses)

    def _trace_back(
        self,
        norm: str,
        variable: Any,
        makers: Mapping[Any, Any],
        uses: Mapping[Any, int],
    ) -> None:
        used_once = True
        while True:
            used_once &= uses[variable] == 1
            maker = makers.get(variable)
            if maker is None:
                self.reasons[norm] = "its input is one of the model, or of a part of it"
                return
            if maker.primitive.name != "name":
                name = maker.params.get("name") or maker.primitive.name
                self.reasons[norm] = f"its input is a result of {name}, not of a layer"
                return
            mark = _mark_of(maker)
            if mark.startswith(_LAYER):
                break
            (variable,) = maker.invars
        if used_once:
            self.sources[norm] = mark
        else:
            path = mark.removeprefix(_LAYER)
            self.reasons[norm] = f"the output of {path} is used elsewhere, too"


def _is_variable(atom: Any) -> bool:
    return not hasattr(atom, "val")  # as a literal has


def _mark_of(equation: Any) -> str:
    return equation.params["name"] if equation.primitive.name == "name" else ""


def _inner_jaxprs(equation: Any) -> Iterator[Any]:
    for leaf in jax.tree.leaves(
        equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns")
    ):
        if hasattr(leaf, "eqns"):
            # A closed jaxpr has equations, too, but its results are the open one's.
            yield getattr(leaf, "jaxpr", leaf)


def _match(
    norm: _Norm,
    layers: Mapping[str, _Layer],
    marks: _Marks,
    params: Mapping[tuple[str, ...], jax.Array],
) -> tuple[_Layer | None, str | None]:
    """The layer that a normalisation folds into, or why there is none."""
    mark = _NORM + norm.name
    if norm.reason is not None:
        return None, norm.reason
    if marks.calls[mark] > 1:
        return None, "it is called more than once"
    if mark in marks.reasons:
        return None, marks.reasons[mark]
    layer = layers[marks.sources[mark].removeprefix(_LAYER)]
    if marks.calls[_LAYER + layer.name] > 1:
        return None, f"{layer.name} is called more than once"
    if getattr(layer.module, "transpose_kernel", False):
        return None, f"the kernel of {layer.name} is transposed"
    # WeightNorm computes a kernel from it; scan has one for each of its steps.
    stored = params.get((*layer.module.path, layer.kernel))
    computed = _KERNEL + layer.name in marks.computed
    if stored is None or computed or stored.shape != layer.kernel_shape:
        reason = f"the kernel of {layer.name} is not a parameter as it is stored"
        return None, reason
    return layer, None


def _own_reason(
    module: Any, given: Mapping[str, Any], x: jax.Array, y: jax.Array
) -> str | None:
    """Why a normalisation cannot be folded, if that is its own doing."""
    axes = make_layout(x.shape, module.axis).feature_axes
    if axes != (x.ndim - 1,):
        return f"its feature axes are {axes} of {x.ndim}, not the last one alone"
    if any(given.get(name) is not None for name in ("mask", "weights")):
        return "it is called with a mask or weights"
    if y.dtype != x.dtype:
        return f"it turns {x.dtype} into {y.dtype}"
    return None


def _check_inference(module: Any, name: str, use_running_average: bool | None) -> None:
    attribute = "use_running_average"
    inference = nn.merge_param(
        attribute, module.use_running_average, use_running_average
    )
    if not (inference or getattr(module, "frozen", False)):
        raise ValueError(
            f"{name or 'the model'} normalises by the batch in this call; fold what "
            "the model does at inference, for example with train=False."
        )


def _fold_one(
    norm: _Norm, layer: _Layer, flat: dict[str, dict[tuple[str, ...], Any]]
) -> None:
    """Moves a normalisation's variables into its layer's."""
    norm_path, layer_path = norm.module.path, layer.module.path

    def take(collection: str, name: str) -> Any:
        return flat[collection].pop((*norm_path, name), None)

    params = BatchNormParams(take("params", "scale"), take("params", "bias"))
    stats = BatchStats(take("batch_stats", "mean"), take("batch_stats", "var"))
    kernel = flat["params"][*layer_path, layer.kernel]
    bias = flat["params"].get((*layer_path, "bias"))
    eps = norm.module.epsilon
    fold = fold_dense if kernel.ndim == 2 else fold_conv
    new_kernel, new_bias = fold(kernel, bias, params, stats, eps=eps)
    flat["params"][*layer_path, layer.kernel] = new_kernel
    flat["params"][*layer_path, "bias"] = new_bias
    factor, _ = inference_affine(params, stats, eps=eps)
    flat[FOLDED][*norm_path, "factor"] = factor
    if bias is None:
        flat[FOLDED][*layer_path, "adds_bias"] = jnp.ones((), bool)
