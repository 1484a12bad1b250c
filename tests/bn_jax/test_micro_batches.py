"""Accumulating over micro-batches gives what one large batch gives."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax import (
    BatchStats,
    accumulate_gradients,
    batch_norm,
    init_params,
    init_stats,
)
from tests.bn_jax.reference import assert_close, plain_batch_norm
from tests.bn_jax.sharing import MODES, map_devices

F32 = 64 * np.finfo(np.float32).eps
WIDTH, EXAMPLES = 4, 24


def network(normalise, params, x):
    """Two branches, one with a normalisation of its own, meet before the last one."""
    x = jax.nn.tanh(normalise("first", x @ params["kernel"][0]))
    branch = normalise("branch", jnp.square(x) @ params["kernel"][1])
    return normalise("last", (x + branch) @ params["kernel"][2])


def loss_function(normalise, params, stats, micro_batch, **options):
    x, target, weights = micro_batch
    new = {}

    def of_layer(name: str, x: jax.Array) -> jax.Array:
        y, new[name] = normalise(
            params["norm"][name],
            stats[name],
            x,
            weights=weights,
            activation="relu" if name == "branch" else None,
            **options,
        )
        return y

    y = network(of_layer, params, x)
    weights = 1.0 if weights is None else weights
    return jnp.sum(weights * (y - target) ** 3) / EXAMPLES, new


def make(dtype: Any = np.float32, seed: int = 0) -> tuple[Any, Any, Any]:
    """Parameters, statistics, and a batch whose parts have different moments."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), dtype)

    names = ("first", "branch", "last")
    norm = init_params(WIDTH, dtype)
    params = {
        "kernel": [normal(WIDTH, WIDTH) for _ in range(3)],
        "norm": {
            n: jax.tree.map(lambda p: p + 0.3 * normal(WIDTH), norm) for n in names
        },
    }
    stats = {name: init_stats(WIDTH, dtype) for name in names}
    drift = jnp.linspace(-2, 2, EXAMPLES, dtype=dtype)[:, None]
    batch = (normal(EXAMPLES, WIDTH) + drift, normal(EXAMPLES, WIDTH), None)
    return params, stats, batch


def split(batch: Any, *number: int) -> Any:
    return jax.tree.map(lambda a: a.reshape(*number, -1, *a.shape[1:]), batch)


def large_batch(params, stats, batch, **options):
    """One device, one batch."""
    loss = functools.partial(loss_function, functools.partial(batch_norm, train=True))
    loss = functools.partial(loss, **options)
    return jax.jit(jax.value_and_grad(loss, has_aux=True))(params, stats, batch)


def accumulated(params, stats, micro_batches, **options):
    loss = functools.partial(loss_function, **options)
    accumulate = functools.partial(accumulate_gradients, loss)
    return jax.jit(accumulate)(params, stats, micro_batches)


def assert_trees_close(actual: Any, expected: Any, tolerance: float) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert_close(a, b, tolerance)


@pytest.mark.parametrize("number", [1, 2, 6, 24])
def test_same_as_one_large_batch(number):
    params, stats, batch = make()
    got = accumulated(params, stats, split(batch, number))
    assert_trees_close(got, large_batch(params, stats, batch), F32)


@pytest.mark.usefixtures("x64")
def test_same_as_plain_automatic_differentiation_in_float64():
    params, stats, batch = make(np.float64, seed=1)
    (loss, _), grads = accumulated(params, stats, split(batch, 4))

    def plain_loss(params):
        x, target, _ = batch

        def normalise(name, x):
            return plain_batch_norm(params["norm"][name], x, relu=name == "branch")

        return jnp.sum((network(normalise, params, x) - target) ** 3) / EXAMPLES

    expected_loss, expected = jax.value_and_grad(plain_loss)(params)
    assert_close(loss, expected_loss, 1e-12)
    assert_trees_close(grads, expected, 1e-12)


def test_it_is_not_what_separate_micro_batches_give():
    params, stats, batch = make()
    _, expected = large_batch(params, stats, batch)
    separate = [
        large_batch(params, stats, jax.tree.map(lambda a, i=i: a[i], split(batch, 4)))
        for i in range(4)
    ]
    grads = jax.tree.map(lambda *parts: sum(parts), *(grads for _, grads in separate))
    difference = jax.tree.map(lambda a, b: abs(a - b).max(), grads, expected)
    assert min(jax.tree.leaves(difference)) > 0.01


def test_padding_is_deleted():
    params, stats, (x, target, _) = make()
    # 6, 3, 0 and 1 valid examples.
    valid = np.arange(6)[None] < np.array([6, 3, 0, 1])[:, None]
    weights = valid.reshape(-1, 1).astype(np.float32)
    rows = np.flatnonzero(weights)
    padded = jnp.where(weights == 0, jnp.nan, x)
    # The network multiplies NaN by a kernel before it is masked.
    padded = jnp.where(jnp.isnan(padded), 1e6, padded)
    got = accumulated(params, stats, split((padded, target, jnp.asarray(weights)), 4))
    expected = large_batch(params, stats, (x[rows], target[rows], None))
    assert_trees_close(got, expected, F32)


def test_nan_padding_reaches_nothing():
    params, stats, (x, _, _) = make()
    weights = (jnp.arange(EXAMPLES) % 3 > 0).astype(jnp.float32)[:, None]

    def loss(normalise, params, stats, micro_batch):
        x, weights = micro_batch
        # dx of every row, padded ones too, reaches this gradient.
        x = x + params["norm"]["branch"].bias[None]
        for name in ("first", "last"):
            norm = params["norm"][name]
            x, new = normalise(norm, stats[name], x, weights=weights)
            stats = stats | {name: new}
        return jnp.sum(x**3), stats

    @jax.jit
    def run(x):
        return accumulate_gradients(loss, params, stats, split((x, weights), 4))

    padded = run(jnp.where(weights == 0, jnp.nan, x))
    assert_trees_close(padded, run(jnp.where(weights == 0, 7, x)), 0)
    assert np.any(padded[1]["norm"]["branch"].bias)


@pytest.mark.parametrize("mode", MODES)
def test_over_devices_and_micro_batches(mode):
    params, stats, batch = make()
    weights = np.random.default_rng(0).integers(0, 3, (EXAMPLES, 1))
    batch = (*batch[:2], jnp.asarray(weights, jnp.float32))

    def device(params, stats, *micro_batches):
        loss = functools.partial(loss_function, axis_name="a")
        return accumulate_gradients(loss, params, stats, micro_batches)

    mapped = map_devices(mode, device, 4, replicated=2)
    (losses, new), grads = mapped(params, stats, *split(batch, 4, 3))
    total = (lambda a: a[0]) if mode == "checked" else (lambda a: a.sum(0))
    (loss, expected_new), expected_grads = large_batch(params, stats, batch)
    assert_close(losses.sum(), loss, F32)
    assert_trees_close(jax.tree.map(total, grads), expected_grads, F32)
    for device_index in range(4):
        own = jax.tree.map(lambda a, i=device_index: a[i], new)
        assert_trees_close(own, expected_new, F32)


@pytest.mark.parametrize("mode", ["pmap", "checked"])
def test_groups_of_devices(mode):
    params, stats, batch = make()
    groups = ((0, 3), (2, 1))

    def device(params, stats, *micro_batches):
        loss = functools.partial(loss_function, axis_name="a", axis_index_groups=groups)
        return accumulate_gradients(loss, params, stats, (*micro_batches, None))

    mapped = map_devices(mode, device, 4, replicated=2)
    (_, new), grads = mapped(params, stats, *split(batch[:2], 4, 2))
    total = (lambda a: a[0]) if mode == "checked" else (lambda a: a.sum(0))
    expected = []
    for group in groups:
        rows = np.isin(np.arange(EXAMPLES) // 6, group)
        part = (batch[0][rows], batch[1][rows], None)
        expected.append(large_batch(params, stats, part))
        own = jax.tree.map(lambda a, i=group[1]: a[i], new)
        assert_trees_close(own, expected[-1][0][1], F32)
    both = jax.tree.map(jnp.add, *(grads for _, grads in expected))
    assert_trees_close(jax.tree.map(total, grads), both, F32)


def test_frozen_layers_do_not_count():
    params, stats, batch = make()
    stats["first"] = BatchStats(jnp.full(WIDTH, 0.5), jnp.full(WIDTH, 2.0))

    def loss(normalise, params, stats, micro_batch):
        def partly_frozen(norm, own_stats, x, **options):
            train = own_stats is not stats["first"]
            return normalise(norm, own_stats, x, train=train, **options)

        return loss_function(partly_frozen, params, stats, micro_batch)

    got = accumulate_gradients(loss, params, stats, split(batch, 3))
    expected = jax.value_and_grad(functools.partial(loss, batch_norm), has_aux=True)(
        params, stats, batch
    )
    assert_trees_close(got, expected, F32)


def test_images_in_half_precision():
    # Sums are float32, so what differs is the rounding of y and of its gradient.
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(8, 3, 3, 2)) + 1, jnp.bfloat16)
    params, stats = init_params(2), init_stats(2)

    def loss(normalise, params, stats, x):
        y, stats = normalise(params, stats, x, activation="relu")
        return jnp.sum(y.astype(jnp.float32) ** 2), stats

    accumulate = jax.jit(functools.partial(accumulate_gradients, loss))
    got = accumulate(params, stats, x.reshape(4, 2, 3, 3, 2))
    whole = functools.partial(loss, functools.partial(batch_norm, train=True))
    expected = jax.jit(jax.value_and_grad(whole, has_aux=True))(params, stats, x)
    assert_trees_close(got, expected, F32)


def test_memory_is_that_of_a_micro_batch():
    params, stats, _ = make()
    batch = tuple(jnp.ones((4096, WIDTH)) for _ in range(2))

    def temporary_bytes(function, *args):
        compiled = jax.jit(function).lower(*args).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    def whole(params, stats, batch):
        return large_batch(params, stats, (*batch, None))

    def parts(params, stats, batch):
        micro_batches = (*split(batch, 32), None)
        return accumulated(params, stats, micro_batches)

    expected = temporary_bytes(whole, params, stats, batch)
    assert temporary_bytes(parts, params, stats, batch) < expected / 8


@pytest.mark.parametrize(
    ("micro_batches", "message"),
    [
        ((jnp.ones((2, 3)), jnp.ones((3, 3))), "one leading axis of micro-batches"),
        ((jnp.ones(()),), "one leading axis"),
        ((), r"got shapes \[\]"),
        (jnp.ones((0, 3, 4)), "micro_batches are empty"),
    ],
)
def test_bad_micro_batches(micro_batches, message):
    with pytest.raises(ValueError, match=message):
        accumulate_gradients(loss_function, {}, {}, micro_batches)


def test_a_network_that_uses_another_batch_norm():
    params, stats, batch = make()

    def loss(normalise, *args):
        return loss_function(functools.partial(batch_norm, train=True), *args)

    with pytest.raises(ValueError, match="never called the batch_norm"):
        accumulate_gradients(loss, params, stats, split(batch, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 0}, "eps must be positive"),
        ({"axis": 3}, "out of range"),
        ({"decay": 2}, "decay must be within"),
        ({"axis": (0, 1)}, "shape"),
        ({"axis_index_groups": ((0,),)}, "without axis_name"),
    ],
)
def test_bad_arguments_of_batch_norm(options, message):
    params, stats, batch = make()
    with pytest.raises(ValueError, match=message):
        accumulated(params, stats, split(batch, 2), **options)


def test_one_value_per_feature_in_all_micro_batches_together():
    params, stats, batch = make()
    one = jax.tree.map(lambda a: a[:1], batch)
    with pytest.raises(ValueError, match="more than one value per feature"):
        accumulated(params, stats, split(one, 1))
