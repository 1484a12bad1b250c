"""Whether a folded model computes what the trained one does, on a batch."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bn_jax.folding_program import inner_jaxprs

# How far outputs may differ, as a part of their largest value, by the coarsest dtype
# that the model computes in: as rounding grows in networks of some hundred layers.
TOLERANCES = {"float64": 1e-10, "float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}


def check_same(
    trained: Callable[[], Any], folded: Callable[[], Any], tolerance: float | None
) -> float:
    """The largest difference of two functions' outputs, relative to their scale.

    Args:
      trained: returns arrays.
      folded: returns others of the same structure.
      tolerance: of the difference; None for that of the dtype.

    Raises:
      ValueError: the difference is larger, or not finite; nothing is there to compare.
    """
    # Products in lower precision, the default of accelerators, round either otherwise.
    with jax.default_matmul_precision("highest"):
        dtype = max(
            _dtypes(jax.make_jaxpr(trained)().jaxpr), key=TOLERANCES.__getitem__
        )
        outputs = trained(), folded()
    if tolerance is None:
        tolerance = TOLERANCES[dtype]
    structures = [str(jax.tree.structure(output)) for output in outputs]
    if structures[0] != structures[1]:
        raise ValueError(
            f"the folded model returns {structures[1]}, expected {structures[0]}."
        )
    expected, got = map(jax.tree.leaves, outputs)
    differences = [0.0]
    for want, have in zip(expected, got, strict=True):
        if not jnp.issubdtype(jnp.result_type(want), jnp.floating):
            continue
        want, have = (np.asarray(array, np.float64) for array in (want, have))
        distance = np.abs(have - want) / (np.abs(want).max(initial=0) or 1)
        differences.append(distance.max(initial=0))
        if not differences[-1] <= tolerance:
            at = np.unravel_index(distance.argmax(), distance.shape)
            raise ValueError(
                "the folded model differs from the trained one by "
                f"{differences[-1]:.1e} of its largest output, expected at most "
                f"{tolerance:.0e} (it computes in {dtype}): {have[at]} in place of "
                f"{want[at]} at {tuple(map(int, at))}. Compare with the arguments that "
                "the model was folded for, or pass a tolerance."
            )
    return float(max(differences))


def _dtypes(jaxpr: Any) -> Iterator[str]:
    yield jnp.result_type(float).name
    for equation in jaxpr.eqns:
        for variable in (*equation.invars, *equation.outvars):
            name = str(getattr(variable.aval, "dtype", None))
            if name in TOLERANCES:
                yield name
        for inner in inner_jaxprs(equation):
            yield from _dtypes(inner)
