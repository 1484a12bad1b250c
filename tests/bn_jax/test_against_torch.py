"""Agreement with torch in float64, on the same rounded inputs."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax import BatchStats, batch_norm
from tests.bn_jax.reference import (
    Problem,
    Step,
    actual_step,
    assert_close,
    assert_steps_close,
    expected_step,
    make_problem,
)

torch = pytest.importorskip("torch", reason="torch comes with the extra `peers`")

SHAPES = [
    ((7, 3), -1),
    ((4, 3, 5), 1),
    ((3, 4, 5, 2), -1),
    ((3, 2, 4, 5), 1),
    ((2, 3, 2, 3, 4), -1),
    ((2, 4, 2, 3, 3), 1),
    ((8, 2, 3, 2), (1, 2, 3)),
]
F32 = 32 * np.finfo(np.float32).eps
F64 = 64 * np.finfo(np.float64).eps
ACTIVATIONS = pytest.mark.parametrize("activation", [None, "relu"])


def tensor(array: Any, requires_grad: bool = False) -> Any:
    copy = torch.tensor(np.float64(array))
    return copy.requires_grad_(requires_grad)


def torch_step(
    problem: Problem,
    axis: int | Sequence[int],
    activation: str | None,
    decay: float = 0.99,
    train: bool = True,
) -> Step:
    """The same step with torch's batch_norm, features moved to where it has them."""
    axes = sorted(a % problem.x.ndim for a in ([axis] if axis in (1, -1) else axis))
    last = range(problem.x.ndim - len(axes), problem.x.ndim)
    moved = np.moveaxis(np.float64(problem.x), axes, last)
    x = tensor(moved.reshape(-1, problem.params.scale.size), requires_grad=True)
    scale, bias = (tensor(p.ravel(), requires_grad=True) for p in problem.params)
    mean, var = (tensor(s.ravel()) for s in problem.stats)
    y = torch.nn.functional.batch_norm(
        x, mean, var, scale, bias, training=train, momentum=1 - decay, eps=1e-5
    )
    y = torch.relu(y) if activation else y
    dy = np.moveaxis(np.float64(problem.dy), axes, last).reshape(x.shape)
    y.backward(tensor(dy))

    def back(rows: Any) -> np.ndarray:
        return np.moveaxis(rows.detach().numpy().reshape(moved.shape), last, axes)

    features = problem.params.scale.shape
    per_feature = (t.numpy().reshape(features) for t in (mean, var))
    mean, var = per_feature
    dscale, dbias = (t.grad.numpy().reshape(features) for t in (scale, bias))
    return Step(back(y), mean, var, back(x.grad), dscale, dbias)


@pytest.mark.usefixtures("x64")
@ACTIVATIONS
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
@pytest.mark.parametrize("mean", [0.5, 30.0])
def test_float64(shape, axis, activation, mean):
    problem = make_problem(shape, axis, mean=mean, dtype=np.float64)
    got = actual_step(problem, axis=axis, activation=activation, decay=0.9)
    expected = torch_step(problem, axis, activation, decay=0.9)
    # What rounding the input by half a unit in the last place does, for both.
    assert_steps_close(got, expected, F64 * mean)


@ACTIVATIONS
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_lower_precision(shape, axis, dtype, activation):
    problem = make_problem(shape, axis, dtype=dtype)
    got = actual_step(problem, axis=axis, activation=activation)
    expected = torch_step(problem, axis, activation)
    # Sums and statistics are float32's; y and dx are rounded to x's dtype once more.
    value_tolerance = F32 + float(jnp.finfo(dtype).eps) / 2
    assert_steps_close(got, expected, F32, value_tolerance)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_inference(shape, axis):
    problem = make_problem(shape, axis, dtype=np.float64)
    params, stats, x, _ = problem
    y = batch_norm(params, stats, jnp.asarray(x), train=False, axis=axis)[0]
    assert_close(y, torch_step(problem, axis, None, train=False).y, F64)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_the_numpy_reference_agrees_with_torch(shape, axis):
    problem = make_problem(shape, axis, dtype=np.float64)
    for activation in (None, "relu"):
        expected = torch_step(problem, axis, activation)
        got = expected_step(problem, axis=axis, activation=activation)
        assert_steps_close(got, expected, F64)


@pytest.mark.usefixtures("x64")
def test_statistics_over_many_steps():
    rng = np.random.default_rng(0)
    bn = torch.nn.BatchNorm1d(3, momentum=0.1, dtype=torch.float64)
    params, stats, *_ = make_problem((4, 3), dtype=np.float64)
    stats = BatchStats(jnp.zeros(3), jnp.ones(3))
    for _ in range(20):
        x = rng.normal(5, 2, (4, 3))
        stats = batch_norm(params, stats, jnp.asarray(x), train=True, decay=0.9)[1]
        bn(torch.tensor(x))
    assert_close(stats.mean, bn.running_mean.numpy(), F64)
    assert_close(stats.var, bn.running_var.numpy(), F64)


def test_torch_refuses_one_value_per_feature_as_well():
    problem = make_problem((1, 3))
    with pytest.raises(ValueError, match="more than one value per feature"):
        actual_step(problem)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        torch_step(problem, -1, None)
