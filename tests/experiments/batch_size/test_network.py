"""The small network: its convolutions are convolutions, its normalisations as named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.batch_size.network import (
    NORMALISATIONS,
    PATCH_SIZES,
    Mode,
    apply_network,
    init_network,
)

WIDTHS = (4, 8, 8)


def mode(train: bool = True) -> Mode:
    return Mode(train, 0.9, 1e-3, 2, 2, jnp.array(3.0), jnp.array(5.0))


def test_patches_are_convolutions_with_a_stride_of_their_size():
    network, stats = init_network(jax.random.key(0), WIDTHS, 5)
    images = jax.random.normal(jax.random.key(1), (2, 32, 32, 1))

    def nothing(params, stats, x, mode):
        return x, stats

    logits, _ = apply_network(network, stats, images, nothing, mode())
    x, inputs = images, 1
    for layer, patch, width in zip(network.layers, PATCH_SIZES, WIDTHS, strict=True):
        kernel = layer.kernel.reshape(patch, patch, inputs, width)
        x = jax.lax.conv_general_dilated(
            x,
            kernel,
            (patch, patch),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        x, inputs = jnp.maximum(x, 0), width
    expected = x.mean((1, 2)) @ network.kernel + network.bias
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


# The axes of (batch, rows, columns, groups, features of a group) that share moments.
AXES = {
    "batch_norm": (0, 1, 2),
    "layer_norm": (1, 2, 3, 4),
    "group_norm": (1, 2, 4),
    "instance_norm": (1, 2),
}


@pytest.mark.parametrize("method", AXES)
def test_normalisations_in_training(method):
    network, (stats, *_) = init_network(jax.random.key(0), WIDTHS, 5)
    x = jax.random.normal(jax.random.key(1), (6, 3, 3, 4)) * 2 + 1
    y, _ = NORMALISATIONS[method](network.layers[0].norm, stats, x, mode())
    groups = np.float64(x).reshape(6, 3, 3, 2, 2)
    mean = groups.mean(AXES[method], keepdims=True)
    var = groups.var(AXES[method], keepdims=True)
    expected = ((groups - mean) / np.sqrt(var + 1e-3)).reshape(x.shape)
    np.testing.assert_allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize("method", NORMALISATIONS)
def test_only_batch_normalisations_keep_statistics(method):
    network, (stats, *_) = init_network(jax.random.key(0), WIDTHS, 5)
    x = jax.random.normal(jax.random.key(1), (6, 3, 3, 4)) + 1
    _, new = NORMALISATIONS[method](network.layers[0].norm, stats, x, mode())
    moved = bool(jnp.any(new.mean != stats.mean))
    assert moved == (method in ("batch_norm", "ghost", "renorm"))
    _, same = NORMALISATIONS[method](network.layers[0].norm, new, x, mode(False))
    np.testing.assert_array_equal(same.mean, new.mean)
