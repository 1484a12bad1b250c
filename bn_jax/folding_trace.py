"""Which layer each normalisation of a model can be folded into, and why not.

Whoever runs the model marks where each normalisation begins and ends, and what modules
return. Marks are names in the jaxpr, as `jax.ad_checkpoint.checkpoint_name` gives them,
and change nothing. All else follows from the jaxpr.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.xla_metadata import set_xla_metadata

from bn_jax.folding_program import (
    MARK,
    Layer,
    Leaf,
    Operation,
    Path,
    Program,
    Stays,
    check_unpadded,
)
from bn_jax.layout import make_layout

_MASKS = ("mask", "weights")
_counter = itertools.count()


class Finding(NamedTuple):
    """What became of one normalisation of a model."""

    norm: str  # its path in the model
    layer: str | None  # the path of the layer that it is folded into
    reason: str | None  # why it is folded into none

    def __str__(self) -> str:
        if self.reason is None:
            return f"{self.norm}: folded into {self.layer}"
        return f"{self.norm}: not folded, since {self.reason}"


class Fold(NamedTuple):
    """What to fold where."""

    norm: Path
    kernel: Path
    bias: Path  # there may be none there as yet
    inputs: int | None  # the kernel's axis of normalised inputs; None: norm is after it
    outputs: int  # the kernel's axis of features


class _Call(NamedTuple):
    """What is known of a normalisation's call."""

    shape: tuple[int, ...] = ()
    activation: str | None = None
    reason: str | None = None  # why it cannot be folded, whatever is around it


class Trace:
    """A model's calls of normalisations, and what its jaxpr says of them."""

    def __init__(self, separator: str) -> None:
        self._separator = separator  # between the parts of a path
        self._calls: dict[Path, _Call] = {}
        self._paddings: dict[Path, Any] = {}  # of modules

    def norm(
        self,
        path: Path,
        module: Any,
        call: Callable[..., jax.Array],
        x: jax.Array,
        given: Mapping[str, Any],
    ) -> jax.Array:
        """Calls a normalisation at inference, marked.

        Args:
          path: where it is.
          module: of Flax, linen or nnx.
          call: called as call(x, **given).
          x: the input.
          given: its other arguments.

        Raises:
          ValueError: it trains in this call.
        """
        name = self._name(path)
        if not is_inference(module, given):
            raise ValueError(
                f"{name or 'the model'} normalises by the batch in this call; fold "
                "what the model does at inference, for example with train=False."
            )
        y = call(checkpoint_name(x, f"{MARK}norm/{name}"), **given)
        activation = getattr(module, "activation", None)
        reason = _reason_of_call(x, y, module, given)
        self._calls[path] = _Call(x.shape, activation, reason)
        return checkpoint_name(y, f"{MARK}norm_end/{name}")

    def leave(self, path: Path, reason: str) -> None:
        """Says why a normalisation stays, unless it was called."""
        self._calls.setdefault(path, _Call(reason=reason))

    def module(self, path: Path, module: Any, y: Any) -> Any:
        """Marks what a module returns, if that is an array: a bias can be added."""
        if not isinstance(y, jax.Array):
            return y
        self._paddings[path] = getattr(module, "padding", None)
        return checkpoint_name(y, f"{MARK}module/{self._name(path)}")

    def program(
        self,
        run: Callable[[Any, Sequence[Any]], Any],
        variables: Any,
        leaves: Sequence[Leaf],
        args: Sequence[Any],
    ) -> Program:
        """Traces a model, which tells of its calls.

        Args:
          run: called as run(variables, args).
          variables: traced.
          leaves: of the variables, in their order.
          args: arrays in them are traced, and all else is passed as it is.
        """
        flat, structure = jax.tree.flatten(args)
        arrays = [leaf if hasattr(leaf, "shape") else None for leaf in flat]

        def traced(variables: Any, arrays: list[Any]) -> Any:
            pairs = zip(flat, arrays, strict=True)
            merged = [leaf if array is None else array for leaf, array in pairs]
            return run(variables, jax.tree.unflatten(structure, merged))

        # JAX does not run a function again that it has traced before, and would mark
        # nothing. Metadata is part of what it remembers a trace by.
        with set_xla_metadata(bn_jax_folding=next(_counter)):
            jaxpr = jax.make_jaxpr(traced)(variables, arrays).jaxpr
        return Program(jaxpr, leaves, self._separator)

    def findings(self, program: Program) -> list[tuple[Finding, Fold | None]]:
        """One for each normalisation, with the fold if there is one."""
        return [self._finding(program, path) for path in self._calls]

    def _finding(self, program: Program, path: Path) -> tuple[Finding, Fold | None]:
        name = self._name(path)
        try:
            fold = self._fold(program, path)
        except Stays as stays:
            return Finding(name, None, str(stays)), None
        return Finding(name, self._name(fold.kernel[:-1]), None), fold

    def _fold(self, program: Program, path: Path) -> Fold:
        shape, activation, reason = self._calls[path]
        if reason is not None:
            raise Stays(reason)
        begin, end = _region(program, self._name(path), shape)
        _check_variables(program, path, begin, end, shape[-1:])
        try:
            layer = program.layer_before(begin.inputs[0])
            return self._fold_into(program, layer._replace(inputs=None), path)
        except Stays as stays:
            reason = str(stays)
        try:
            if activation is not None:
                raise Stays(f"its {activation} is between it and what follows")
            layer = program.layer_after(end.outputs[0])
            check_unpadded(layer, self._paddings.get(layer.kernel.path[:-1]))
            return self._fold_into(program, layer, path)
        except Stays as stays:
            raise Stays(f"{reason}, and {stays}") from None

    def _fold_into(self, program: Program, layer: Layer, norm: Path) -> Fold:
        owner = layer.kernel.path[:-1]
        name = f"module/{self._name(owner)}"
        if layer.bias is not None:
            bias = layer.bias.path
        else:
            bias = (*owner, "bias")
            taken = any(leaf.path == bias for leaf in program.leaves.values())
            if taken or name not in layer.marks or len(program.marks[name]) != 1:
                raise Stays(f"{self._name(owner)} cannot take a bias")
        return Fold(norm, layer.kernel.path, bias, layer.inputs, layer.outputs)

    def _name(self, path: Path) -> str:
        return self._separator.join(map(str, path))


def _region(
    program: Program, name: str, shape: tuple[int, ...]
) -> tuple[Operation, Operation]:
    """Where a normalisation begins and ends."""
    begins, ends = (program.marks[f"{kind}/{name}"] for kind in ("norm", "norm_end"))
    if f"norm/{name}" in program.enclosed:
        raise Stays(f"it is called within {program.enclosed[f'norm/{name}']}")
    if len(begins) != 1 or len(ends) != 1:
        raise Stays(f"it is called {len(begins)} times")
    if begins[0].outputs[0].shape != shape:
        raise Stays("it is called within vmap")
    return begins[0], ends[0]


def _check_variables(
    program: Program,
    path: Path,
    begin: Operation,
    end: Operation,
    shape: tuple[int, ...],
) -> None:
    """A normalisation has its variables to itself, as they are stored."""
    missing = {"mean", "var"}
    for value, leaf in program.leaves.items():
        if leaf.path[:-1] != path:
            continue
        positions = [reader.position for reader in value.readers]
        if not all(begin.position < at < end.position for at in positions):
            raise Stays(f"its {leaf.path[-1]} is used elsewhere, too")
        if positions and value.shape == shape:
            missing.discard(leaf.path[-1])
    if missing:
        raise Stays(f"its {min(missing)} is not a variable as it is stored")


def _reason_of_call(
    x: jax.Array, y: jax.Array, module: Any, given: Mapping[str, Any]
) -> str | None:
    """Why a normalisation cannot be folded, whatever comes before or after it."""
    axes = make_layout(x.shape, module.axis).feature_axes
    if axes != (x.ndim - 1,):
        return f"its feature axes are {axes} of {x.ndim}, not the last one alone"
    if any(given.get(name) is not None for name in _MASKS):
        return "it is called with a mask or weights"
    if y.dtype != x.dtype:
        return f"it turns {x.dtype} into {y.dtype}"
    return None


def computes_as(module: Any, classes: tuple[Any, ...]) -> bool:
    """A module is of one of these classes, or of one derived without another call."""
    return isinstance(module, classes) and any(
        type(module).__call__ is kind.__call__ for kind in classes
    )


def is_inference(module: Any, given: Mapping[str, Any]) -> bool:
    """A normalisation of Flax takes its statistics in this call, and no batch's."""
    use_running_average = given.get("use_running_average")
    if use_running_average is None:
        use_running_average = module.use_running_average
    return bool(use_running_average or getattr(module, "frozen", False))


def check_folded_call(
    name: str, use_running_average: bool, given: Mapping[str, Any]
) -> None:
    """A folded normalisation is called as the one that was folded.

    Raises:
      ValueError: it is to train, or gets a mask or weights, which fold into nothing.
    """
    masks = [name for name in _MASKS if given.get(name) is not None]
    if masks or not use_running_average:
        raise ValueError(
            f"{name or 'the model'} is folded, and is called "
            f"{f'with {masks[0]}' if masks else 'to train'}: it was folded in a call "
            "at inference and without masks. Fold the model as it is called here, or "
            "call it as it was folded."
        )
