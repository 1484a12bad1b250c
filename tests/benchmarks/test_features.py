"""The table beside other libraries: what it must say of bn_jax."""

import pytest

from benchmarks.features import CHECKS, NO, YES
from benchmarks.libraries import LIBRARIES, Layer, Library
from tests.bn_jax.reference import lenient

# Every other check answers with yes.
NUMBERS = {
    "largest error of y, mean 10,000, std 1": 1e-3,
    "relative error of running variance, bfloat16": 1e-5,
    "bytes kept for the gradient, with ReLU, of x's": 1.05,
}
ERRORS = ("training on one value per feature", "parameters without statistics")


@pytest.mark.parametrize("title", CHECKS)
def test_bn_jax(title):
    with lenient():
        outcome = CHECKS[title](LIBRARIES["bn_jax"])
    if title in NUMBERS:
        assert 0 <= float(outcome) <= NUMBERS[title]
    else:
        assert outcome == ("ValueError" if title in ERRORS else YES)


def test_a_check_can_fail():
    def biased(shape, dtype, decay):
        return Layer((), lambda params, x: (x, x), lambda x: (x.mean(0), x.var(0)))

    assert (
        CHECKS["running variance is unbiased (Algorithm 2)"](Library("jax", biased))
        == NO
    )
