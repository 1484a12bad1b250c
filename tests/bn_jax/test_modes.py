"""Each cell of docs/modes.md: every public function in every mode gives the same."""

from pathlib import Path

import jax
import numpy as np
import pytest

from tests.bn_jax.modes import FUNCTIONS, MODES, Outputs, plainly, table


@pytest.fixture(scope="module")
def plain_outputs() -> dict[str, Outputs]:
    return {name: plainly(function) for name, function in FUNCTIONS.items()}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("mode", MODES)
def test_every_function_in_every_mode(mode, function, plain_outputs):
    found = MODES[mode](FUNCTIONS[function])
    expected = plain_outputs[function]
    for part, name in ((found.examples, "examples"), (found.features, "features")):
        wanted = getattr(expected, name)
        if part is None:
            continue
        for actual, want in zip(
            jax.tree.leaves(part), jax.tree.leaves(wanted), strict=True
        ):
            np.testing.assert_allclose(actual, want, rtol=2e-5, atol=2e-6)


def test_the_page_shows_what_is_tested():
    page = Path(__file__).parents[2] / "docs" / "modes.md"
    assert table() in page.read_text()
