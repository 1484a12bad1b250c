"""The kernels that XLA is compared with on a GPU are right, interpreted here."""

import itertools

import jax
import numpy as np
import pytest

from benchmarks import pallas, results
from tests.benchmarks.test_benchmarks import tiny

# The second leaves rows that whole blocks do not sum.
SHAPES = [(512, 64), (403, 128)]
CASES = [
    (shape, tile)
    for shape in SHAPES
    for tile in itertools.starmap(pallas.Tile, pallas.TILES)
    if shape[1] % tile.columns == 0
]


@pytest.mark.parametrize(("shape", "tile"), CASES)
@pytest.mark.parametrize("name", ["moments", "normalise", "backward's sums"])
def test_kernels_compute_what_xla_does(shape, tile, name):
    each = pallas.passes(shape)[name]
    expected = jax.tree.leaves(jax.jit(each.xla)(*each.arguments))
    actual = jax.tree.leaves(each.pallas(tile, *each.arguments))
    for a, b in zip(actual, expected, strict=True):
        scale = np.abs(np.float32(b)).max()
        np.testing.assert_allclose(
            np.float32(a) / scale, np.float32(b) / scale, atol=1e-5
        )


def test_main(tmp_path):
    pallas.main(tiny(tmp_path))
    rows = results.read(tmp_path / "results.json")["rows"]
    assert {"XLA", "Pallas, 64x64, 4 warps"} <= {row["name"] for row in rows}
