"""How many layers in a program wait for one another's moments, from its jaxpr.

A layer's moments are those of a batch that has gone through the layers before it. The
input of each layer has a name, as `jax.ad_checkpoint.checkpoint_name` gives them.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

# Where a value does not depend on the batch at all.
INDEPENDENT = -1


def depths(jaxpr: Any, of_inputs: Sequence[int], layer: str) -> list[int]:
    """How many layers there are on the way to each result, at most.

    Args:
      jaxpr: the program's.
      of_inputs: the same for its inputs: 0 for the batch.
      layer: what the name of every layer's input begins with.

    Returns:
      A depth for each result: 0 if it depends on the batch before any layer, and
      `INDEPENDENT` if it does not depend on it.

    Raises:
      ValueError: there is a layer in a loop of unknown length.
    """
    known = dict(zip(jaxpr.invars, of_inputs, strict=True))

    def read(atoms: Sequence[Any]) -> list[int]:
        return [
            INDEPENDENT if hasattr(atom, "val") else known.get(atom, INDEPENDENT)
            for atom in atoms
        ]

    for equation in jaxpr.eqns:
        results = _of_equation(equation, read(equation.invars), layer)
        known |= zip(equation.outvars, results, strict=True)
    return read(jaxpr.outvars)


def count(jaxpr: Any, worth: Callable[[str], int]) -> int:
    """Adds up what the names in a program are worth, each as often as it is met."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "name":
            total += worth(equation.params["name"])
            continue
        inner = [count(each, worth) for each in _inner_jaxprs(equation)]
        one_of_them = equation.primitive.name == "cond"
        once = max(inner, default=0) if one_of_them else sum(inner)
        total += once * equation.params.get("length", 1)
    return total


def _of_equation(equation: Any, of_inputs: list[int], layer: str) -> Sequence[int]:
    deepest = max(of_inputs, default=INDEPENDENT)
    number = len(equation.outvars)
    inner = list(_inner_jaxprs(equation))
    kind = equation.primitive.name
    if kind == "name" and equation.params["name"].startswith(layer):
        return [max(deepest, 0) + 1]
    if kind == "scan":
        return _of_scan(equation, of_inputs, layer)
    if kind == "cond":
        branches = [depths(branch, of_inputs[1:], layer) for branch in inner]
        return [max(of_inputs[0], *ways) for ways in zip(*branches, strict=True)]
    if len(inner) == 1 and len(inner[0].invars) == len(of_inputs):
        return depths(inner[0], of_inputs, layer)
    if any(count(each, lambda name: name.startswith(layer)) for each in inner):
        raise ValueError(
            f"a batch normalisation trains within {kind}, where it is not known how "
            "often; use jax.lax.scan, or a Python loop."
        )
    return [deepest] * number


def _of_scan(equation: Any, of_inputs: list[int], layer: str) -> Sequence[int]:
    (body,) = _inner_jaxprs(equation)
    # What is stacked has an axis more without than within; its counts among the
    # parameters have other names in each version of JAX.
    num_stacked = _num_stacked(equation.outvars, body.outvars)
    last = len(of_inputs) - _num_stacked(equation.invars, body.invars)
    carried = slice(last - len(equation.outvars) + num_stacked, last)
    results = [*of_inputs[carried], *[INDEPENDENT] * num_stacked]
    for _ in range(equation.params["length"]):
        before, of_inputs = of_inputs, of_inputs.copy()
        results = depths(body, before, layer)
        of_inputs[carried] = map(max, before[carried], results)
        if of_inputs == before:
            break
    return results


def _num_stacked(without: Sequence[Any], within: Sequence[Any]) -> int:
    pairs = zip(without, within, strict=True)
    return sum(outer.aval.ndim > inner.aval.ndim for outer, inner in pairs)


def _inner_jaxprs(equation: Any) -> Iterator[Any]:
    for leaf in jax.tree.leaves(list(equation.params.values())):
        if hasattr(leaf, "eqns"):
            # A closed jaxpr has equations, too, but its inputs are the open one's.
            yield getattr(leaf, "jaxpr", leaf)
