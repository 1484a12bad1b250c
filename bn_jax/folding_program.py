"""What a jaxpr says of layers: which product makes a value, of which kernel and bias.

A layer is a product of arrays whose second is a kernel as it is stored, and what leaves
features apart on the way from there. So layers need no names or classes.
"""

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Path = tuple[Any, ...]  # of a module in its model, or of one of its variables

# What is written out where it is called. Loops and branches are not.
_CALLS = {"jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint"} | {
    f"custom_{kind}_call" for kind in ("jvp", "vjp")
}
_IDENTITIES = {"copy", "name", "reshard", "sharding_constraint", "stop_gradient"}
MARK = "bn_jax.folding/"  # what marks begin with


class Leaf(NamedTuple):
    """A variable that the traced function takes."""

    path: Path
    is_parameter: bool
    is_tied: bool = False  # the model holds it at several places


class Stays(Exception):
    """A normalisation cannot be folded, for the reason that this says."""


@dataclasses.dataclass(eq=False)
class Value:
    """An array of the program."""

    shape: tuple[int, ...]
    dtype: Any
    maker: "Operation | None" = None  # None for inputs and constants
    literal: Any = None
    readers: list["Operation"] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(eq=False)
class Operation:
    """An equation of the program."""

    name: str
    label: str  # what users know it as: relu rather than max
    params: Mapping[str, Any]
    inputs: list[Value]
    position: int
    outputs: list[Value]

    @property
    def mark(self) -> str:
        """What it marks, if it does."""
        name = self.params["name"] if self.name == "name" else ""
        return name.removeprefix(MARK) if name.startswith(MARK) else ""


class Layer(NamedTuple):
    """A product of a program with a kernel, and its bias."""

    product: Operation
    kernel: Leaf
    inputs: int | None  # the kernel's axis of the layer's inputs, if there is one
    outputs: int  # the kernel's axis of the layer's features
    bias: Leaf | None
    marks: set[str]  # of what else could add a bias


class Program:
    """A jaxpr in one list of operations, with what it calls written out."""

    def __init__(self, jaxpr: Any, leaves: Sequence[Leaf], separator: str) -> None:
        self._separator = separator  # between the parts of a path
        self.marks = collections.defaultdict[str, list[Operation]](list)
        self.enclosed: dict[str, str] = {}  # marks, and the loop or branch around them
        self._operations: list[Operation] = []
        inputs = [_value(variable) for variable in jaxpr.invars]
        # Those after the leaves are the arguments of the model.
        self.leaves = dict(zip(inputs, leaves, strict=False))
        for value, leaf in self.leaves.items():
            if leaf.is_tied:
                value.readers.append(self._operation("tie", {}, [], []))
        outputs = self._write_out(jaxpr, inputs)
        self._operation("what the model returns", {}, outputs, [])

    def layer_before(self, value: Value) -> Layer:
        """The layer that a value is the output of.

        Raises:
          Stays: it is none.
        """
        bias, marks, in_place = None, set[str](), True
        while True:
            maker = value.maker
            if maker is None:
                raise Stays("its input is one of the model, or of a loop in it")
            if len(value.readers) > 1:
                raise Stays(f"the output of {_label(maker)} is used elsewhere, too")
            if maker.name in _AXES:
                return self._layer(maker, bias, marks)
            if maker.name == "add" and bias is None and in_place:
                value, bias = self._without_bias(maker)
                if bias is None:
                    raise Stays("its input is a result of add, not of a layer")
            elif _keeps_features(maker):
                if bias is None and in_place:
                    marks.add(maker.mark)
                value = maker.inputs[0]
            elif _sums(maker):
                in_place = False  # a bias would be summed, too
                value = maker.inputs[0]
            else:
                raise Stays(f"its input is a result of {_label(maker)}, not of a layer")

    def layer_after(self, value: Value) -> Layer:
        """The layer that a value is the input of.

        Raises:
          Stays: it is none, or of several.
        """
        product = self._reader(value)
        while product.name not in _AXES:
            if not _keeps_features(product):
                raise Stays(f"its output goes into {_label(product)}, not a layer")
            product = self._reader(product.outputs[0])
        bias, marks, (value,) = None, set[str](), product.outputs
        while len(value.readers) == 1:
            (reader,) = value.readers
            if reader.name == "add":
                _, bias = self._without_bias(reader)
            if reader.name == "add" or not _keeps_features(reader):
                break
            marks.add(reader.mark)
            (value,) = reader.outputs
        return self._layer(product, bias, marks)

    def _reader(self, value: Value) -> Operation:
        if len(value.readers) != 1:
            raise Stays(f"its output is used {len(value.readers)} times")
        return value.readers[0]

    def _without_bias(self, add: Operation) -> tuple[Value, Leaf | None]:
        """What a bias is added to, and the bias, if one is."""
        for bias, value in (add.inputs, add.inputs[::-1]):
            path = [bias]
            while path[-1].maker is not None and _keeps_features(path[-1].maker):
                path += path[-1].maker.inputs
            if path[-1] in self.leaves and len(path[-1].shape) == 1:
                return value, self._parameter(path)
        return add.outputs[0], None

    def _layer(self, product: Operation, bias: Leaf | None, marks: set[str]) -> Layer:
        inputs, outputs = _AXES[product.name](product)
        path = [product.inputs[1]]
        while path[-1] not in self.leaves:
            maker = path[-1].maker
            if maker is None:
                raise Stays("the kernel of the layer is not a variable")
            before = maker.inputs[0]
            if maker.name == "transpose":
                permutation = maker.params["permutation"]
                outputs = permutation[outputs]
                inputs = None if inputs is None else permutation[inputs]
            elif maker.name == "rev" and outputs not in maker.params["dimensions"]:
                inputs = None if inputs in maker.params["dimensions"] else inputs
            elif maker.name == "mul":  # by a mask
                inputs = None
            elif maker.name == "dot_general":  # of the kernels of two layers in one
                inputs, (before, outputs) = None, _factor(maker, outputs)
            elif (
                maker.name == "reshape"
                and _keeps_features(maker)
                and (outputs == len(path[-1].shape) - 1)
            ):
                inputs, outputs = None, len(before.shape) - 1
            elif not _keeps_values(maker):
                raise Stays(f"the kernel of the layer is made by {_label(maker)}")
            path.append(before)
        kernel = self._parameter(path)
        return Layer(product, kernel, inputs, outputs, bias, marks)

    def _parameter(self, path: Sequence[Value]) -> Leaf:
        """The parameter that a path leads to, which nothing else reads on the way."""
        leaf = self.leaves[path[-1]]
        name = (
            f"the {leaf.path[-1]} of {self._separator.join(map(str, leaf.path[:-1]))}"
        )
        if not (leaf.is_parameter and jnp.issubdtype(path[-1].dtype, jnp.floating)):
            raise Stays(f"{name} is not a floating-point parameter")
        if any(len(value.readers) > 1 for value in path):
            raise Stays(f"{name} is used elsewhere, too")
        return leaf

    def _write_out(self, jaxpr: Any, arguments: Sequence[Value]) -> list[Value]:
        """Adds the operations of a jaxpr, and returns its results."""
        values = dict(zip(jaxpr.invars, arguments, strict=True))
        values |= {variable: _value(variable) for variable in jaxpr.constvars}

        def look_up(atom: Any) -> Value:
            return _value(atom) if hasattr(atom, "val") else values[atom]

        for equation in jaxpr.eqns:
            inputs = [look_up(atom) for atom in equation.invars]
            name, inner = equation.primitive.name, [*inner_jaxprs(equation)]
            if name in _CALLS and len(inner) == 1:
                start = len(self._operations)
                outputs = self._write_out(inner[0], inputs)
                written = self._operations[start:]
                if not any(operation.mark for operation in written):
                    for operation in written:  # of a function such as relu
                        operation.label = equation.params.get("name", operation.label)
            else:
                outputs = [_value(variable) for variable in equation.outvars]
                self._operation(name, equation.params, inputs, outputs)
                for mark in _marks_within(inner):
                    self.enclosed[mark] = name
            values.update(zip(equation.outvars, outputs, strict=True))
        return [look_up(atom) for atom in jaxpr.outvars]

    def _operation(
        self,
        name: str,
        params: Mapping[str, Any],
        inputs: list[Value],
        outputs: list[Value],
    ) -> Operation:
        position = len(self._operations)
        operation = Operation(name, name, params, inputs, position, outputs)
        self._operations.append(operation)
        if operation.mark:
            self.marks[operation.mark].append(operation)
        for value in inputs:
            value.readers.append(operation)
        for value in outputs:
            value.maker = operation
        return operation


def paths(tree: Any) -> list[Path]:
    """Of a tree's leaves, the keys of the dictionaries that they lie in."""
    return [
        tuple(key.key for key in keys if isinstance(key, jax.tree_util.DictKey))
        for keys, _ in jax.tree_util.tree_leaves_with_path(tree)
    ]


def _value(variable: Any) -> Value:
    aval = variable.aval
    shape, dtype = getattr(aval, "shape", ()), getattr(aval, "dtype", None)
    return Value(shape, dtype, literal=getattr(variable, "val", None))


def _label(operation: Operation) -> str:
    """What users know an operation as: a module by its path."""
    _, _, path = operation.mark.partition("/")
    return path or operation.label


def _keeps_values(operation: Operation) -> bool:
    if operation.name == "convert_element_type":  # to int8 would be more than rounding
        dtype = operation.params["new_dtype"]
        return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits >= 16
    # A normalisation's marks surround what is none of these.
    return operation.name in _IDENTITIES and not operation.mark.startswith("norm")


def _keeps_features(operation: Operation) -> bool:
    """Values stay, and so does their place along the last axis."""
    if operation.name not in ("reshape", "broadcast_in_dim"):
        return _keeps_values(operation)
    (before, *_), (after,) = operation.inputs, operation.outputs
    last = operation.params.get("broadcast_dimensions", (len(after.shape) - 1,))[-1:]
    return last == (len(after.shape) - 1,) and before.shape[-1:] == after.shape[-1:]


def _sums(operation: Operation) -> bool:
    """Zeros are added, or sums are taken, along axes other than the last."""
    last = len(operation.inputs[0].shape) - 1 if operation.inputs else -1
    if operation.name == "reduce_sum":
        return last not in operation.params["axes"]
    if operation.name != "pad":
        return False
    padding = operation.inputs[1]
    while padding.maker is not None and padding.maker.name == "convert_element_type":
        (padding,) = padding.maker.inputs
    return padding.literal == 0 and not any(operation.params["padding_config"][last])


def _dot_axes(dot: Operation) -> tuple[int | None, int]:
    """The axes of a kernel's inputs, if they are one, and of its features."""
    (left, right), (batch, _) = dot.params["dimension_numbers"]
    ranks = [len(value.shape) for value in dot.inputs]
    free = {*range(ranks[1])} - {*right}
    if batch or len(free) != 1:
        raise Stays("its features are not one axis of a kernel")
    return (right[0] if (*left,) == (ranks[0] - 1,) else None), free.pop()


def _conv_axes(conv: Operation) -> tuple[int | None, int]:
    last = len(conv.inputs[0].shape) - 1
    numbers = conv.params["dimension_numbers"]
    if conv.params["batch_group_count"] != 1 or numbers.out_spec[1] != last:
        raise Stays("the features of its convolution are not the last axis alone")
    outputs, inputs = numbers.rhs_spec[:2]
    return (inputs if numbers.lhs_spec[1] == last else None), outputs


def _factor(dot: Operation, axis: int) -> tuple[Value, int]:
    """The factor of a product that an axis of it is from, and its axis there."""
    contracted, batch = dot.params["dimension_numbers"]
    axes = [(dot.inputs[0], at) for at in batch[0]]
    for value, *used in zip(dot.inputs, contracted, batch, strict=True):
        free = set(range(len(value.shape))).difference(*used)
        axes += [(value, at) for at in sorted(free)]
    return axes[axis]


def check_unpadded(layer: Layer, padding: Any) -> None:
    """A layer adds up the same of its inputs at every position, and nothing else.

    Args:
      layer: a product.
      padding: as its module was made with; None if that is not known.

    Raises:
      Stays: it does not, here or for inputs of another size.
    """
    if layer.inputs is None:
        raise Stays("the layer after it is no plain product")
    if layer.product.name == "dot_general":
        return
    params = layer.product.params
    padded = any(map(any, params["padding"]))
    if padded or any(dilation > 1 for dilation in params["lhs_dilation"]):
        raise Stays("the convolution after it pads its input")
    window = params["dimension_numbers"].rhs_spec[2:]
    spans = any(layer.product.inputs[1].shape[axis] > 1 for axis in window)
    if spans and (padding is None or str(padding).upper().startswith("SAME")):
        raise Stays("the convolution after it may pad inputs of other sizes")


_AXES = {"dot_general": _dot_axes, "conv_general_dilated": _conv_axes}


def inner_jaxprs(equation: Any) -> Iterator[Any]:
    """The jaxprs that an equation calls."""
    for leaf in jax.tree.leaves(
        equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns")
    ):
        if hasattr(leaf, "eqns"):
            # A closed jaxpr has equations, too, but its results are the open one's.
            yield getattr(leaf, "jaxpr", leaf)


def _marks_within(jaxprs: Sequence[Any]) -> Iterator[str]:
    for jaxpr in jaxprs:
        for equation in jaxpr.eqns:
            name = str(equation.params.get("name"))
            if equation.primitive.name == "name" and name.startswith(MARK):
                yield name.removeprefix(MARK)
            yield from _marks_within([*inner_jaxprs(equation)])
