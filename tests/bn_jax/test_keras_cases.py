"""Keras's cases for its BatchNormalization, put to our linen module.

Written anew from the public test of Keras
(keras/src/layers/normalization/batch_normalization_test.py): same inputs, same
expectations, but where a test says otherwise and why. Keras's `training` is our
`use_running_average=False`, its `trainable=False` our `frozen`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax.linen import BatchNorm

KEY = jax.random.key(0)
RANDOM = np.random.default_rng(1337)


def call(module, variables, x, training=True, **options):
    y, updated = module.apply(
        variables,
        x,
        use_running_average=not training,
        mutable=["batch_stats"],
        **options,
    )
    return np.asarray(y), variables | updated


def init(module, x):
    return module.init(KEY, x, use_running_average=True)


@pytest.mark.parametrize(
    ("shape", "learn", "parameters"),
    [((2, 3), True, 2), ((2, 3), False, 0), ((2, 4, 4, 3), True, 2)],
)
def test_bn_basics(shape, learn, parameters):
    module = BatchNorm(use_bias=learn, use_scale=learn)
    x = RANDOM.normal(size=shape).astype(np.float32)
    variables = init(module, x)
    assert len(variables.get("params", {})) == parameters
    assert len(variables["batch_stats"]) == 2
    y, _ = call(module, variables, x)
    assert y.shape == shape


@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("shape", [(5, 2, 3), (5, 3, 3, 2)])
@pytest.mark.parametrize("initial", [(0.0, 0.0), (1.0, 1.0), (0.0, 1.0)])
def test_correctness(axis, shape, initial):
    module = BatchNorm(axis=axis, momentum=0.0, unbiased=False, epsilon=1e-3)
    x = (5 + 10 * RANDOM.normal(size=shape)).astype(np.float32)
    variables = init(module, x)
    names = ("mean", "var")
    variables["batch_stats"] = {
        name: jnp.full(shape[axis], value)
        for name, value in zip(names, initial, strict=True)
    }
    y = x
    for _ in range(3):
        y, variables = call(module, variables, y)
    reduced = tuple(i for i in range(len(shape)) if i != axis % len(shape))
    np.testing.assert_allclose(y.mean(reduced), 0, atol=1e-3)
    np.testing.assert_allclose(y.std(reduced), 1, atol=1e-3)
    np.testing.assert_allclose(variables["batch_stats"]["mean"], 0, atol=1e-3)
    np.testing.assert_allclose(variables["batch_stats"]["var"], 1, atol=1e-3)

    before, _ = call(module, variables, x, training=False)
    trained, variables = call(module, variables, x)
    assert not np.allclose(before, trained)
    after, _ = call(module, variables, x, training=False)
    np.testing.assert_allclose(after, trained, rtol=1e-4, atol=1e-5)

    mask = np.ones((*shape[:2], *(1,) * (len(shape) - 2)), bool)
    mask[:, 1] = False
    if axis == -1:
        unmasked, _ = call(module, variables, x, training=False)
        masked, _ = call(module, variables, x, training=False, mask=mask)
        # Keras leaves an output where there is padding; ours is 0.
        np.testing.assert_array_equal(masked, np.where(mask, unmasked, 0))
        masked, _ = call(module, variables, x, mask=mask)
        assert not np.allclose(unmasked, masked)


def test_input_fully_masked():
    module = BatchNorm(use_scale=False, use_bias=False)
    x = np.zeros((4, 5), np.float32)
    y, variables = call(module, init(module, x), x, mask=np.zeros((4, 1)))
    np.testing.assert_array_equal(y, np.zeros_like(x))
    # And the statistics stay, where Flax's become NaN.
    np.testing.assert_array_equal(variables["batch_stats"]["var"], np.ones(5))


@pytest.mark.parametrize("mask_value", [0.0, 0.1, 1.0, np.nan])
def test_batchnorm_ignore_masked_values(mask_value):
    rows = [[1, 5], [2, 5], [mask_value] * 2, [mask_value] * 2]
    x = np.array([rows] * 10, np.float32)
    module = BatchNorm(momentum=0.0, unbiased=False)
    mask = np.array([True, True, False, False]).reshape(1, 4, 1)
    variables = init(module, x)
    for _ in range(5):
        _, variables = call(module, variables, x, mask=mask)
    np.testing.assert_allclose(variables["batch_stats"]["mean"], [1.5, 5.0])
    np.testing.assert_allclose(variables["batch_stats"]["var"], [0.25, 0.0])


def test_trainable_behavior():
    frozen = BatchNorm(momentum=0.8, epsilon=1e-7, frozen=True)
    x = (5 + 10 * RANDOM.normal(size=(200, 4, 4, 3))).astype(np.float32)
    variables = init(frozen, x)
    y, variables = call(frozen, variables, x)
    np.testing.assert_allclose(y, x, rtol=1e-6)
    for _ in range(10):
        y, variables = call(frozen.clone(frozen=False), variables, x)
    np.testing.assert_allclose(y.mean((0, 1, 2)), 0, atol=1e-3)
    np.testing.assert_allclose(y.std((0, 1, 2)), 1, atol=1e-3)


def test_large_value_in_half_precision():
    module = BatchNorm(dtype=jnp.float16)
    x = jnp.full((2, 3), 1000.0, jnp.float16)
    variables = init(module, x)
    variables["batch_stats"]["var"] = jnp.full(3, 70_000.0)  # no float16
    y, variables = call(module, variables, x, training=False)
    np.testing.assert_allclose(y, 1000 / np.sqrt(70_000), rtol=1e-3)
    np.testing.assert_array_equal(variables["batch_stats"]["var"], np.full(3, 7e4))


def test_masked_broadcast_normalization():
    x = jnp.ones((1, 2, 3, 4))
    module = BatchNorm(momentum=0.0, epsilon=1e-3)
    y, variables = call(module, init(module, x), x, mask=jnp.ones((1, 2, 1, 1)))
    np.testing.assert_allclose(y, np.zeros(x.shape), atol=1e-6)
    np.testing.assert_allclose(variables["batch_stats"]["mean"], 1, atol=1e-6)
    np.testing.assert_allclose(variables["batch_stats"]["var"], 0, atol=1e-6)


@pytest.mark.parametrize("momentum", [-0.1, 1.5])
def test_invalid_momentum(momentum):
    x = np.ones((4, 2), np.float32)
    module = BatchNorm(momentum=momentum)
    with pytest.raises(ValueError, match=r"decay must be within \[0, 1\]"):
        call(module, init(BatchNorm(), x), x)


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_boundaries_of_momentum(momentum):
    x = np.ones((4, 2), np.float32)
    module = BatchNorm(momentum=momentum)
    _, variables = call(module, init(module, x), x)
    np.testing.assert_allclose(variables["batch_stats"]["mean"], 1 - momentum)
