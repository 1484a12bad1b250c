"""Accumulating over micro-batches gives what one large batch gives."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bn_jax.linen
import bn_jax.nnx
from bn_jax import (
    BatchStats,
    accumulate_gradients,
    batch_norm,
    batch_renorm,
    ghost_batch_norm,
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


def loss_function(params, stats, micro_batch, normalise=batch_norm, **options):
    x, target, weights = micro_batch
    new = {}

    def of_layer(name: str, x: jax.Array) -> jax.Array:
        y, new[name] = normalise(
            params["norm"][name],
            stats[name],
            x,
            weights=weights,
            activation="relu" if name == "branch" else None,
            **{"train": True} | options,
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
    loss = functools.partial(loss_function, **options)
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

    def loss(params, stats, micro_batch):
        x, weights = micro_batch
        # dx of every row, padded ones too, reaches this gradient.
        x = x + params["norm"]["branch"].bias[None]
        for name in ("first", "last"):
            norm = params["norm"][name]
            x, new = batch_norm(norm, stats[name], x, train=True, weights=weights)
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

    def loss(params, stats, micro_batch):
        def normalise(norm, own_stats, x, **options):
            options["train"] = norm is not params["norm"]["first"]
            return batch_norm(norm, own_stats, x, **options)

        return loss_function(params, stats, micro_batch, normalise)

    accumulate = jax.jit(functools.partial(accumulate_gradients, loss))
    got = accumulate(params, stats, split(batch, 3))
    expected = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, stats, batch)
    assert_trees_close(got, expected, F32)


def test_images_in_half_precision():
    # Sums are float32, so what differs is the rounding of y and of its gradient.
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(8, 3, 3, 2)) + 1, jnp.bfloat16)
    params, stats = init_params(2), init_stats(2)

    def loss(params, stats, x):
        y, stats = batch_norm(params, stats, x, train=True, activation="relu")
        return jnp.sum(y.astype(jnp.float32) ** 2), stats

    accumulate = jax.jit(functools.partial(accumulate_gradients, loss))
    got = accumulate(params, stats, x.reshape(4, 2, 3, 3, 2))
    expected = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, stats, x)
    assert_trees_close(got, expected, F32)


# A network of three layers by each way to write it, with the parameters and statistics
# of its layers stacked.


def one_layer(params, stats, x, **options):
    y, stats = batch_norm(
        params["norm"], stats, x @ params["kernel"], train=True, **options
    )
    return jnp.tanh(y) + 0.3 * x, stats


def unrolled(layer, params, stats, x):
    new = []
    for i in range(3):
        own = jax.tree.map(lambda leaf, i=i: leaf[i], (params, stats))
        x, new_stats = layer(*own, x)
        new.append(new_stats)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *new)


def scanned(layer, params, stats, x):
    return jax.lax.scan(lambda x, own: layer(*own, x), x, (params, stats))


def within_cond(layer, params, stats, x):
    network = functools.partial(unrolled, layer)

    def without_layers(params, stats, x):
        return x, stats

    return jax.lax.cond(len(x) > 0, network, without_layers, params, stats, x)


def transformed(transform, network=unrolled):
    """All of a network, rather than each of its layers."""
    return lambda layer, *args: transform(functools.partial(network, layer))(*args)


def of_layers(transform, network=unrolled):
    return lambda layer, *args: network(transform(layer), *args)


WAYS = {
    "plain": unrolled,
    "jit": transformed(jax.jit),
    "jit of layers": of_layers(jax.jit),
    "checkpoint": transformed(jax.checkpoint),
    "checkpoint of layers": of_layers(jax.checkpoint),
    "scan": scanned,
    "jit of scan": transformed(jax.jit, scanned),
    "scan of checkpoint": of_layers(jax.checkpoint, scanned),
    "cond": within_cond,
}


def make_stacked(dtype=np.float32):
    rng = np.random.default_rng(1)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    norm = init_params((3, WIDTH), dtype)
    norm = jax.tree.map(lambda leaf: leaf + 0.3 * normal(3, WIDTH), norm)
    params = {"kernel": normal(3, WIDTH, WIDTH), "norm": norm}
    return params, init_stats((3, WIDTH), dtype)


def stacked_loss(way, params, stats, batch, layer=one_layer):
    x, target, _ = batch
    y, stats = way(layer, params, stats, x)
    return jnp.sum((y - target) ** 3) / EXAMPLES, stats


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("way", WAYS)
def test_exact_however_the_network_is_written(way):
    params, stats = make_stacked(np.float64)
    batch = make(np.float64)[2]
    loss = functools.partial(stacked_loss, WAYS[way])
    expected = functools.partial(stacked_loss, unrolled)
    expected = jax.jit(jax.value_and_grad(expected, has_aux=True))(params, stats, batch)
    accumulate = jax.jit(functools.partial(accumulate_gradients, loss))
    got = accumulate(params, stats, split(batch, 4))
    assert_trees_close(got, expected, 1e-11)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("way", ["jit of layers", "scan of checkpoint"])
def test_transformed_layers_over_devices(way, mode):
    params, stats = make_stacked()
    batch = make()[2]
    layer = functools.partial(one_layer, axis_name="a")
    loss = functools.partial(stacked_loss, WAYS[way], layer=layer)

    def device(params, stats, *micro_batches):
        return accumulate_gradients(loss, params, stats, (*micro_batches, None))

    mapped = map_devices(mode, device, 4, replicated=2)
    (losses, new), grads = mapped(params, stats, *split(batch[:2], 4, 3))
    total = (lambda a: a[0]) if mode == "checked" else (lambda a: a.sum(0))
    whole = functools.partial(stacked_loss, unrolled)
    (expected_loss, expected_new), expected_grads = jax.jit(
        jax.value_and_grad(whole, has_aux=True)
    )(params, stats, batch)
    assert_close(losses.sum(), expected_loss, F32)
    assert_trees_close(jax.tree.map(total, grads), expected_grads, F32)
    assert_trees_close(jax.tree.map(lambda a: a[-1], new), expected_new, F32)


def test_devices_that_do_not_share_moments():
    """Each accumulates its own batch; in the checked mode its moments vary, too."""
    params, stats, batch = make()
    mapped = map_devices("checked", lambda *args: accumulated(*args), 2, replicated=2)
    halves = split(batch, 2)
    (losses, new), grads = mapped(params, stats, split(batch, 2, 3))
    expected = [
        large_batch(params, stats, jax.tree.map(lambda a, i=i: a[i], halves))
        for i in range(2)
    ]
    for i, ((expected_loss, expected_new), _) in enumerate(expected):
        assert_close(losses[i], expected_loss, F32)
        own = jax.tree.map(lambda a, i=i: a[i], new)
        assert_trees_close(own, expected_new, F32)
    both = jax.tree.map(jnp.add, *(grads for _, grads in expected))
    assert_trees_close(jax.tree.map(lambda a: a[0], grads), both, F32)


def test_the_program_does_not_grow_with_the_depth():
    _, _, batch = make()

    def size(depth):
        params = {"kernel": jnp.ones((depth, WIDTH, WIDTH))}
        params["norm"] = init_params((depth, WIDTH))
        loss = functools.partial(stacked_loss, scanned)
        args = params, init_stats((depth, WIDTH)), split(batch, 4)
        accumulate = functools.partial(accumulate_gradients, loss)
        return len(str(jax.make_jaxpr(accumulate)(*args)))

    assert size(100) < 1.1 * size(3)


def test_networks_without_normalisations():
    params, _, batch = make()

    def loss(params, stats, micro_batch):
        x, target, _ = micro_batch
        return jnp.sum((x @ params["kernel"][0] - target) ** 2), {"steps": stats}

    def counting(params, stats, micro_batch):
        return loss(params, stats["steps"] + 1, micro_batch)

    got = accumulate_gradients(
        counting, params, {"steps": jnp.int32(3)}, split(batch, 3)
    )
    expected = jax.value_and_grad(counting, has_aux=True)
    assert_trees_close(got, expected(params, {"steps": jnp.int32(3)}, batch), F32)


def test_wholly_masked_batches_move_nothing():
    params, stats, (x, target, _) = make()
    batch = (x, target, jnp.zeros((EXAMPLES, 1)))
    got = accumulated(params, stats, split(batch, 3))
    assert_trees_close(got, large_batch(params, stats, batch), F32)
    assert_trees_close(got[0][1], stats, 0)


@pytest.mark.parametrize(
    "flag",
    [
        "jax_debug_nans",
        pytest.param("jax_check_tracer_leaks", marks=pytest.mark.slow),
    ],
)
def test_under_debugging_flags(flag):
    (params, stats), batch = make_stacked(), make()[2]
    loss = functools.partial(stacked_loss, scanned)
    expected = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, stats, batch)
    jax.config.update(flag, True)
    try:
        got = accumulate_gradients(loss, params, stats, split(batch, 3))
    finally:
        jax.config.update(flag, False)
    assert_trees_close(got, expected, F32)


def norm(stats, x, **options):
    return batch_norm(init_params(WIDTH), stats, x, train=True, **options)


def use_twice(stats, x):
    y, _ = norm(stats["a"], x)
    y, new = norm(stats["a"], jnp.sin(y))
    return y, stats | {"a": new}


def use_twice_in_a_row(stats, x):
    y, new = norm(stats["a"], x)
    y, new = norm(new, jnp.sin(y))
    return y, stats | {"a": new}


def use_twice_in_a_scan(stats, x):
    def body(carry, _):
        x, stats = carry
        return norm(stats, x), None

    (y, new), _ = jax.lax.scan(body, (x, stats["a"]), length=3)
    return y, stats | {"a": new}


def forget_new_statistics(stats, x):
    return norm(stats["a"], x)[0], stats


def return_old_statistics(stats, x):
    return norm(stats["a"], x)[0], {"a": init_stats(WIDTH), "b": init_stats(WIDTH)}


def use_statistics_from_elsewhere(stats, x):
    y, _ = norm(init_stats(WIDTH), x)
    y, new = norm(stats["a"], y)
    return y, stats | {"a": new}


def use_another_library(stats, x):
    y, new = norm(stats["a"], x)
    other = stats["b"]._replace(mean=y.mean(0))
    return y - other.mean[None], {"a": new, "b": other}


def normalise_lanes_apart(stats, x):
    lanes = x.reshape(2, -1, WIDTH)
    y, new = jax.vmap(norm, in_axes=(None, 0))(stats["a"], lanes)
    return y, stats | {"a": new}


def normalise_in_a_while_loop(stats, x):
    def body(carry):
        return norm(carry[1], carry[0])[::1]

    y, new = jax.lax.while_loop(lambda carry: carry[0][0, 0] > 0, body, (x, stats["a"]))
    return y, stats | {"a": new}


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (use_twice, "normalise 8 features, but statistics of 4 come back"),
        (use_twice_in_a_row, "two sets of moments; give it two of statistics"),
        (use_twice_in_a_scan, "normalise 12 features, but statistics of 4"),
        (forget_new_statistics, "must return the new ones"),
        (return_old_statistics, "in the structure in which it got them"),
        (use_statistics_from_elsewhere, "did not pass"),
        (use_another_library, "statistics of b move, but not by bn_jax"),
        (normalise_lanes_apart, "in the structure in which it got them"),
        (normalise_in_a_while_loop, "within while"),
    ],
)
def test_networks_that_would_be_wrong(network, message):
    def loss(params, stats, x):
        y, new = network(stats, params * x)
        return jnp.sum(y**3), new

    stats = {"a": init_stats(WIDTH), "b": init_stats(WIDTH)}
    x = make()[2][0]
    with pytest.raises(ValueError, match=message):
        accumulate_gradients(loss, jnp.ones(()), stats, split(x, 3))


@pytest.mark.parametrize(
    "normalise",
    [
        functools.partial(ghost_batch_norm, virtual_batch_size=4),
        functools.partial(batch_renorm, r_max=3.0, d_max=5.0),
    ],
    ids=["ghost", "renormalised"],
)
def test_ghost_batches_and_renormalisation_are_refused_in_training(normalise):
    params, stats, x = init_params(WIDTH), init_stats(WIDTH), make()[2][0]

    def loss(params, stats, x, train):
        y, stats = normalise(params, stats, x, train=train)
        return jnp.sum(y**3), stats

    for train, number in ((False, 3), (True, 1)):
        one = functools.partial(loss, train=train)
        got = accumulate_gradients(one, params, stats, split(x, number))
        expected = jax.value_and_grad(one, has_aux=True)(params, stats, x)
        assert_trees_close(got, expected, F32)
    one = functools.partial(loss, train=True)
    with pytest.raises(TypeError, match="ghost batches and renormalisation do not"):
        accumulate_gradients(one, params, stats, split(x, 3))


# Flax.


class Block(nn.Module):
    options: Any = ()

    @nn.compact
    def __call__(self, x, _=None):
        y = nn.Dense(WIDTH, use_bias=False)(x)
        return nn.tanh(bn_jax.linen.BatchNorm(False, **dict(self.options))(y)) + x, None


class Linen(nn.Module):
    block: type[nn.Module] = Block
    options: Any = ()

    @nn.compact
    def __call__(self, x):
        frozen = bn_jax.linen.BatchNorm(False, frozen=True, name="frozen")
        for _ in range(3):
            x, _ = self.block(self.options)(frozen(x))
        return x


class LinenScan(nn.Module):
    block: type[nn.Module] = Block

    @nn.compact
    def __call__(self, x):
        blocks = nn.scan(
            self.block,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=3,
        )
        return blocks(name="blocks")(x, None)[0]


def linen_loss(model, params, stats, batch):
    x, target, _ = batch
    variables = {"params": params, "batch_stats": stats}
    y, updated = model.apply(variables, x, mutable=["batch_stats"])
    return jnp.sum((y - target) ** 3) / EXAMPLES, updated["batch_stats"]


@pytest.mark.parametrize(
    "model",
    [
        Linen(),
        Linen(nn.remat(Block)),
        Linen(nn.jit(Block)),
        LinenScan(),
        LinenScan(nn.remat(Block)),
    ],
    ids=["plain", "remat", "jit", "scan", "scan of remat"],
)
def test_linen(model):
    batch = make()[2]
    variables = model.init(jax.random.key(0), batch[0])
    args = variables["params"], variables["batch_stats"]
    loss = functools.partial(linen_loss, model)
    got = jax.jit(functools.partial(accumulate_gradients, loss))(*args, split(batch, 4))
    expected = jax.jit(jax.value_and_grad(loss, has_aux=True))(*args, batch)
    assert_trees_close(got, expected, F32)


@pytest.mark.parametrize(
    "options", [{"virtual_batch_size": 3}, {"renormalisation": (3.0, 5.0)}]
)
def test_linen_ghost_batches_and_renormalisation_are_refused(options):
    model, batch = Linen(options=tuple(options.items())), make()[2]
    variables = model.init(jax.random.key(0), batch[0])
    args = variables["params"], variables["batch_stats"]
    with pytest.raises(TypeError, match="ghost batches and renormalisation do not"):
        accumulate_gradients(
            functools.partial(linen_loss, model), *args, split(batch, 4)
        )


def test_flaxs_own_layers_are_named():
    class Mixed(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = bn_jax.linen.BatchNorm(False, name="ours")(x)
            return nn.BatchNorm(False, name="flaxs")(x)

    batch = make()[2]
    variables = Mixed().init(jax.random.key(0), batch[0])
    loss = functools.partial(linen_loss, Mixed())
    with pytest.raises(ValueError, match="statistics of flaxs move, but not by bn_jax"):
        accumulate_gradients(
            loss, variables["params"], variables["batch_stats"], split(batch, 4)
        )


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.norm = bn_jax.nnx.BatchNorm(WIDTH, rngs=rngs)

    def __call__(self, x):
        return nnx.tanh(self.norm(self.dense(x))) + x


class Nnx(nnx.Module):
    def __init__(self, rngs, transform=lambda block: block):
        self.blocks = nnx.List(NnxBlock(rngs) for _ in range(3))
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.transform = transform

    def __call__(self, x):
        for block in self.blocks:
            x = self.transform(NnxBlock.__call__)(block, x)
        return x


class NnxScan(nnx.Module):
    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def make_blocks(rngs):
            return NnxBlock(rngs)

        self.blocks = make_blocks(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, block):
            return block(x)

        return run(x, self.blocks)


def nnx_loss(model, batch):
    x, target, _ = batch
    return jnp.sum((model(x) - target) ** 3) / EXAMPLES


@pytest.mark.parametrize(
    "network",
    [
        Nnx,
        functools.partial(Nnx, transform=nnx.remat),
        functools.partial(Nnx, transform=nnx.jit),
        NnxScan,
    ],
    ids=["plain", "remat", "jit", "scan"],
)
def test_nnx(network):
    batch = make()[2]
    model = network(nnx.Rngs(0))
    expected_model = nnx.clone(model)
    structure = jax.tree.structure(nnx.state(model))
    step = nnx.jit(functools.partial(bn_jax.nnx.accumulate_gradients, nnx_loss))
    got = step(model, split(batch, 4))
    expected = nnx.jit(nnx.value_and_grad(nnx_loss))(expected_model, batch)
    assert_trees_close(got, expected, F32)
    statistics = (nnx.state(each, nnx.BatchStat) for each in (model, expected_model))
    assert_trees_close(*statistics, F32)
    # Nothing is left behind.
    assert jax.tree.structure(nnx.state(model)) == structure


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
