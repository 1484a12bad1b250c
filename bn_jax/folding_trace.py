"""Which layer each normalisation of a model can be folded into, from the model's trace.

Whoever runs the model marks the input of each normalisation and the output of each
layer. Marks are names in the jaxpr, as `jax.ad_checkpoint.checkpoint_name` gives them,
and change nothing.
"""

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name

from bn_jax.layout import make_layout

# What marks begin with, before the name of the layer or normalisation.
_NORM, _LAYER, _KERNEL = (f"bn_jax.folding/{n}/" for n in ("norm", "layer", "kernel"))


class Finding(NamedTuple):
    """What became of one normalisation of a model."""

    norm: str  # its path in the model
    layer: str | None  # the path of the layer that it is folded into
    reason: str | None  # why it is folded into none

    def __str__(self) -> str:
        if self.reason is None:
            return f"{self.norm}: folded into {self.layer}"
        return f"{self.norm}: not folded, since {self.reason}"


class Trace:
    """A model's calls of layers and normalisations, and what its jaxpr says of them."""

    def __init__(self) -> None:
        self._own_reasons: dict[str, str | None] = {}  # for each normalisation
        self._layers: dict[str, tuple[tuple[int, ...], bool]] = {}
        self._calls: collections.Counter[str] = collections.Counter()  # for each mark
        self._computed: set[str] = set()  # marks of values that an operation made
        self._sources: dict[str, str] = {}  # the layer whose output a norm's input is
        self._reasons: dict[str, str] = {}  # or why it is none

    def norm(
        self,
        name: str,
        call: Callable[..., jax.Array],
        x: jax.Array,
        axis: int | Sequence[int],
        given: Mapping[str, Any],
    ) -> jax.Array:
        """Calls a normalisation on its input, marked.

        Args:
          name: its path.
          call: called as call(x, **given).
          x: the input.
          axis: its feature axis or axes.
          given: its other arguments.
        """
        y = call(checkpoint_name(x, _NORM + name), **given)
        self._own_reasons[name] = _own_reason(x, y, axis, given)
        return y

    def layer(
        self, name: str, y: jax.Array, kernel: jax.Array, transposed: bool
    ) -> jax.Array:
        """Marks the output of a layer.

        Args:
          name: its path.
          y: the output.
          kernel: its kernel as it uses it.
          transposed: the kernel's last axis is not that of features.
        """
        checkpoint_name(kernel, _KERNEL + name)
        self._layers[name] = (kernel.shape, transposed)
        return checkpoint_name(y, _LAYER + name)

    def findings(
        self, jaxpr: Any, kernel_shapes: Mapping[str, tuple[int, ...]]
    ) -> tuple[Finding, ...]:
        """Matches normalisations with layers.

        Args:
          jaxpr: of the model, as it was marked.
          kernel_shapes: of the kernels that the model stores, by the names of layers.
        """
        self._read(jaxpr)
        findings = []
        for norm in self._own_reasons:
            reason = self._reason(norm, kernel_shapes)
            layer = self._sources[norm] if reason is None else None
            findings.append(Finding(norm, layer, reason))
        return tuple(findings)

    def _reason(
        self, norm: str, kernel_shapes: Mapping[str, tuple[int, ...]]
    ) -> str | None:
        """Why a normalisation cannot be folded."""
        if self._own_reasons[norm] is not None:
            return self._own_reasons[norm]
        if self._calls[_NORM + norm] > 1:
            return "it is called more than once"
        if norm in self._reasons:
            return self._reasons[norm]
        layer = self._sources[norm]
        if self._calls[_LAYER + layer] > 1:
            return f"{layer} is called more than once"
        shape, transposed = self._layers[layer]
        if transposed:
            return f"the kernel of {layer} is transposed"
        # WeightNorm computes a kernel from it; scan has one for each of its steps.
        if _KERNEL + layer in self._computed or kernel_shapes.get(layer) != shape:
            return f"the kernel of {layer} is not a parameter as it is stored"
        return None

    def _read(self, jaxpr: Any) -> None:
        """Reads a jaxpr and those within it."""
        makers = {variable: e for e in jaxpr.eqns for variable in e.outvars}
        uses = collections.Counter(
            atom
            for atoms in (*(e.invars for e in jaxpr.eqns), jaxpr.outvars)
            for atom in atoms
            if not _is_literal(atom)
        )
        for equation in jaxpr.eqns:
            for inner in _inner_jaxprs(equation):
                self._read(inner)
            mark = _mark_of(equation)
            if not mark:
                continue
            (atom,) = equation.invars
            self._calls[mark] += 1
            if not _is_literal(atom) and atom in makers:
                self._computed.add(mark)
            if mark.startswith(_NORM):
                norm = mark.removeprefix(_NORM)
                self._trace_back(norm, atom, makers, uses)

    def _trace_back(
        self,
        norm: str,
        atom: Any,
        makers: Mapping[Any, Any],
        uses: Mapping[Any, int],
    ) -> None:
        used_once = True
        while True:
            maker = None if _is_literal(atom) else makers.get(atom)
            if maker is None:
                self._reasons[norm] = (
                    "its input is one of the model, or of a part of it"
                )
                return
            used_once &= uses[atom] == 1
            mark = _mark_of(maker)
            if mark.startswith(_LAYER):
                break
            if maker.primitive.name != "name":
                name = _operation(maker)
                self._reasons[norm] = f"its input is a result of {name}, not of a layer"
                return
            (atom,) = maker.invars
        layer = mark.removeprefix(_LAYER)
        if used_once:
            self._sources[norm] = layer
        else:
            self._reasons[norm] = f"the output of {layer} is used elsewhere, too"


def _own_reason(
    x: jax.Array, y: jax.Array, axis: int | Sequence[int], given: Mapping[str, Any]
) -> str | None:
    """Why a normalisation cannot be folded, whatever comes before it."""
    axes = make_layout(x.shape, axis).feature_axes
    if axes != (x.ndim - 1,):
        return f"its feature axes are {axes} of {x.ndim}, not the last one alone"
    if any(given.get(name) is not None for name in ("mask", "weights")):
        return "it is called with a mask or weights"
    if y.dtype != x.dtype:
        return f"it turns {x.dtype} into {y.dtype}"
    return None


def _is_literal(atom: Any) -> bool:
    return hasattr(atom, "val")


def _mark_of(equation: Any) -> str:
    return equation.params["name"] if equation.primitive.name == "name" else ""


def _operation(equation: Any) -> str:
    """A name for what an equation does, such as relu."""
    if name := equation.params.get("name"):
        return str(name)
    for inner in _inner_jaxprs(equation):
        if len(inner.eqns) == 1:  # a wrapper, as of functions with their own gradient
            return _operation(inner.eqns[0])
    return str(equation.primitive.name)


def _inner_jaxprs(equation: Any) -> Iterator[Any]:
    for leaf in jax.tree.leaves(
        equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns")
    ):
        if hasattr(leaf, "eqns"):
            # A closed jaxpr has equations, too, but its results are the open one's.
            yield getattr(leaf, "jaxpr", leaf)


def check_inference(name: str, module: Any, use_running_average: bool | None) -> None:
    """A normalisation does not train in this call.

    Args:
      name: its path.
      module: of Flax, linen or nnx.
      use_running_average: as it is called, None for as the module has it.

    Raises:
      ValueError: it does.
    """
    if use_running_average is None:
        use_running_average = module.use_running_average
    if not (use_running_average or getattr(module, "frozen", False)):
        raise ValueError(
            f"{name or 'the model'} normalises by the batch in this call; fold what "
            "the model does at inference, for example with train=False."
        )
