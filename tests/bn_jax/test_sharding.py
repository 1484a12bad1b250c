"""Meshes of explicit axes: every result is divided as what it belongs to."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import bn_jax
from bn_jax import batch_norm, ghost_batch_norm, init_params, init_stats
from tests.bn_jax.reference import assert_close

F32 = 64 * np.finfo(np.float32).eps
RANDOM = np.random.default_rng(0)
# Of batches that one device holds one, two, five or more examples of, with few or many
# positions: what is sampled and what is summed in parts differs.
SHAPES = [
    (8, 4),
    (16, 4),
    (32, 3, 4),
    (40, 4),
    (64, 7, 7, 4),
    (128, 4),
    (32, 32, 32, 4),
    (1024, 4),
]
WHOLE, BATCH = PartitionSpec(), PartitionSpec("data")
FEATURES = PartitionSpec("model")


@pytest.fixture
def put():
    """Places arrays on a mesh of 4 x 2 devices whose axes are explicit."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)

    def place(tree: Any, spec: PartitionSpec = WHOLE) -> Any:
        return jax.device_put(tree, NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        yield place


def along(spec: PartitionSpec, features: bool, ndim: int) -> PartitionSpec:
    """The spec of an input: its batch is divided, and perhaps its features."""
    return PartitionSpec(*spec, *(None,) * (ndim - 2), *(FEATURES if features else ()))


def assert_divided_like(got: Any, want: Any) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


def step(params, stats, x, weights=None, **options):
    """A step, with the gradients of everything that has one."""

    def loss(params, x, weights):
        y, new = batch_norm(
            params, stats, x, train=True, weights=weights, activation="relu", **options
        )
        return jnp.sum(jnp.sin(y)), (y, new)

    gradient = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)
    return gradient(params, x, weights)


@pytest.mark.parametrize("parameters", ["whole", "divided"])
@pytest.mark.parametrize("features", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_training(put, shape, features, parameters):
    x = RANDOM.normal(1, 2, shape).astype(np.float32)
    params, stats = init_params(4), init_stats(4)
    expected = jax.jit(step)(*jax.device_get((params, stats)), x)
    spec = FEATURES if parameters == "divided" else WHOLE
    params, stats = put((params, stats), spec)
    x = put(x, along(BATCH, features, len(shape)))
    got = jax.jit(step)(params, stats, x)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert_close(jax.device_get(a), b, F32)
    (dparams, dx, _), (y, new) = got
    assert_divided_like((dparams, dx, y, new), (params, x, x, stats))


@pytest.mark.parametrize("divided", [False, True])
@pytest.mark.parametrize("shape", [(40, 4), (32, 3, 4)])
def test_weights(put, shape, divided):
    x = RANDOM.normal(1, 2, shape).astype(np.float32)
    weights = RANDOM.integers(0, 3, (shape[0], *(1,) * (len(shape) - 1)))
    weights = weights.astype(np.float32)
    params, stats = init_params(4), init_stats(4)
    expected = jax.jit(step)(*jax.device_get((params, stats)), x, weights)
    params, stats, x = put(params), put(stats), put(x, BATCH)
    weights = put(weights, BATCH if divided else WHOLE)
    got = jax.jit(step)(params, stats, x, weights)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert_close(jax.device_get(a), b, F32)
    (dparams, dx, dw), (y, new) = got
    assert_divided_like((dparams, dx, dw, y, new), (params, x, weights, x, stats))


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
def test_ghost_batches_of_any_size(put, size):
    """Of parts of a device's examples, and of those of several devices."""
    x = RANDOM.normal(1, 2, (32, 3, 4)).astype(np.float32)
    params, stats = init_params(4), init_stats(4)

    def ghost(params, stats, x):
        return ghost_batch_norm(params, stats, x, train=True, virtual_batch_size=size)

    expected = ghost(*jax.device_get((params, stats)), x)
    params, stats, x = put(params), put(stats), put(x, BATCH)
    got = jax.jit(ghost)(params, stats, x)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert_close(jax.device_get(a), b, F32)
    assert_divided_like(got, (x, stats))


def test_moments_are_divided_as_the_features_are(put):
    x = put(RANDOM.normal(size=(8, 3, 4)).astype(np.float32), along(BATCH, True, 3))
    for moment in jax.jit(bn_jax.moments)(x):
        assert moment.sharding.is_equivalent_to(put(jnp.ones(4), FEATURES).sharding, 1)


def test_called_eagerly(put):
    params, stats = put(init_params(4)), put(init_stats(4))
    x = put(RANDOM.normal(size=(8, 4)).astype(np.float32), BATCH)
    got = batch_norm(params, stats, x, train=True)
    assert_divided_like(got, (x, stats))
    y, _ = batch_norm(params, stats, x, train=False)
    assert_divided_like(y, x)
