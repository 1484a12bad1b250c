import functools
import itertools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

import bn_jax
import bn_jax.linen
import bn_jax.nnx
from bn_jax import (
    BatchStats,
    Moments,
    batch_norm,
    init_params,
    init_stats,
    moments,
    population_statistics,
)
from bn_jax.population import PopulationMoments, finalize, init, merge, update
from tests.bn_jax.reference import assert_close
from tests.bn_jax.sharing import device_mesh

RANDOM = np.random.default_rng(0)


def gather(batches, weights=None):
    population = init(init_stats(batches[0].shape[-1]))
    for batch, own in zip(batches, weights or [None] * len(batches), strict=True):
        population = update(population, moments(batch, weights=own))
    return population


def estimate(population, **options):
    stats = init_stats(population.mean.shape, population.mean.dtype)
    return finalize(population, stats, **options)


def assert_stats(found, mean, var, tolerance=1e-6):
    assert_close(found.mean, mean, tolerance, "mean")
    assert_close(found.var, var, tolerance, "var")


def test_batches_of_one_size_are_algorithm_2():
    x = RANDOM.normal(2, 3, (20, 12, 5))
    batches = list(x.astype(np.float32))
    found = estimate(gather(batches))
    x = np.float64(batches)
    m = 12
    assert_stats(found, x.mean(1).mean(0), m / (m - 1) * x.var(1).mean(0))


def test_pooled_is_as_if_all_batches_were_one():
    batches = [
        RANDOM.normal(i, 2, (size, 5)).astype(np.float32)
        for i, size in enumerate((3, 20, 7))
    ]
    rows = np.concatenate([np.float64(batch) for batch in batches])
    found = estimate(gather(batches), pooled=True)
    assert_stats(found, rows.mean(0), rows.var(0, ddof=1))


def test_weighted_batches_of_uneven_sizes_are_exact():
    batches, weights, rows = [], [], []
    for size in (9, 4, 17, 2):
        batches.append(RANDOM.normal(1, 2, (size, 3)).astype(np.float32))
        counts = RANDOM.integers(0, 4, (size, 1))
        counts[0] = 2
        weights.append(counts.astype(np.float32))
        # A weight of 2 is a value that is there twice, one of 0 a value deleted.
        rows.append(np.repeat(np.float64(batches[-1]), counts[:, 0], axis=0))
    population = gather(batches, weights)
    every = np.concatenate(rows)
    squares = sum(((of - of.mean(0)) ** 2).sum(0) for of in rows)
    assert_stats(estimate(population), every.mean(0), squares / (len(every) - 4))
    pooled = estimate(population, pooled=True)
    assert_stats(pooled, every.mean(0), every.var(0, ddof=1))


@pytest.mark.parametrize("pooled", [False, True])
def test_estimates_of_uneven_batches_are_unbiased(pooled):
    # Over every way to draw batches of 2, 3 and 1 from a population of three values.
    values = np.array([0.0, 1.0, 5.0])
    draws = np.array(list(itertools.product(values, repeat=6)), np.float32)

    def of_draw(draw):
        batches = (draw[:2, None], draw[2:5, None], draw[5:, None])
        return estimate(gather(batches), pooled=pooled)

    found = jax.jit(jax.vmap(of_draw))(draws)
    assert_close(found.mean.mean(), values.mean(), 1e-6)
    assert_close(found.var.mean(), values.var(), 1e-5)


def test_many_batches_far_from_zero_lose_nothing():
    batches = (1e3 + RANDOM.normal(size=(3000, 16, 2))).astype(np.float32)

    @jax.jit
    def run(batches):
        def add(population, batch):
            return update(population, moments(batch)), None

        return jax.lax.scan(add, init(init_stats(2)), batches)[0]

    population = run(batches)
    exact = np.float64(batches)
    within = 16 / 15 * exact.var(1).mean(0)
    found = estimate(population)
    # The mean itself is rounded to 6e-8 of 1e3 in every update.
    np.testing.assert_allclose(found.mean, exact.mean((0, 1)), atol=2e-3)
    np.testing.assert_allclose(found.var, within, rtol=1e-5)
    pooled = estimate(population, pooled=True)
    np.testing.assert_allclose(
        pooled.var, exact.reshape(-1, 2).var(0, ddof=1), rtol=1e-5
    )
    np.testing.assert_array_equal(population.count, [48_000, 48_000])
    np.testing.assert_array_equal(population.num_batches, [3000, 3000])


def test_merging_parts_is_gathering_all():
    batches = [
        RANDOM.normal(i, 2, (size, 5)).astype(np.float32)
        for i, size in enumerate((3, 20, 7, 2, 2))
    ]
    parts = (gather(batches[:2]), gather(batches[2:3]), gather(batches[3:]))
    whole = gather(batches)
    for found, expected in zip(merge(*parts), whole, strict=True):
        assert_close(found, expected, 1e-6)
    with pytest.raises(ValueError, match="one shape"):
        merge(init(init_stats(2)), init(init_stats(3)))


@pytest.mark.parametrize("mode", ["pmap", "shard_map"])
def test_devices_with_batches_of_their_own_merge(mode):
    x = RANDOM.normal(size=(8, 3, 6, 4)).astype(np.float32)

    def per_device(x):
        population = init(init_stats(4))
        for batch in x:
            population = update(population, moments(batch))
        return merge(population, axis_name="a")

    if mode == "pmap":
        found = jax.pmap(per_device, axis_name="a", out_axes=None)(x)
    else:
        found = jax.jit(
            jax.shard_map(
                lambda x: per_device(x[0]),
                mesh=device_mesh(8),
                in_specs=PartitionSpec("a"),
                out_specs=PartitionSpec(),
            )
        )(x)
    expected = gather(list(x.reshape(-1, 6, 4)))
    for name, value in expected._asdict().items():
        assert_close(getattr(found, name), value, 1e-6, name)


def test_batches_without_values_do_not_count():
    nothing = Moments(*jnp.zeros((3, 2)))
    x = RANDOM.normal(size=(6, 2)).astype(np.float32)
    population = update(init(init_stats(2)), nothing)
    population = update(population, moments(x))
    population = update(population, nothing)
    np.testing.assert_array_equal(population.num_batches, [1, 1])
    found = estimate(population)
    assert_stats(found, x.mean(0), x.var(0, ddof=1))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("pooled", [False, True])
def test_what_saw_no_value_keeps_its_statistics_without_a_nan(pooled, compiled):
    old = BatchStats(np.float32([1, 2]), np.float32([3, 4]))
    nothing = {
        "no batch": lambda gathered: gathered,
        "empty": lambda gathered: update(gathered, moments(jnp.zeros((0, 2)))),
        "padding": lambda gathered: update(
            gathered, moments(jnp.ones((3, 2)), weights=jnp.zeros((3, 1)))
        ),
        "merged": lambda gathered: merge(gathered, gathered),
    }

    def run(stats):
        gathered = init(stats)
        gathered = {name: see(gathered[name]) for name, see in nothing.items()}
        return finalize(gathered, stats, pooled=pooled)

    with jax.debug_nans(True), jax.debug_infs(True):
        found = (jax.jit(run) if compiled else run)(dict.fromkeys(nothing, old))
    for name, stats in found.items():
        np.testing.assert_array_equal(stats, old, name)


def test_statistics_beside_frozen_ones_without_a_nan():
    stats = {"live": init_stats(3), "frozen": init_stats(3)}

    def run(stats, x):
        _, live = batch_norm(init_params(3), stats["live"], x, train=True)
        return stats | {"live": live}

    x = RANDOM.normal(size=(8, 3)).astype(np.float32)
    with jax.debug_nans(True):
        for each in (run, jax.jit(run)):
            found = population_statistics(each, stats, [x], keep_unseen=True)
            assert_stats(found["live"], x.mean(0), x.var(0, ddof=1))
            np.testing.assert_array_equal(found["frozen"], stats["frozen"])


def test_a_total_weight_below_2_is_taken_as_2():
    # As the moving average takes it.
    x, weights = np.float32([[1], [4]]), np.full((2, 1), 0.25, np.float32)
    found = estimate(gather([x], [weights]))
    params, stats = init_params(1), init_stats(1)
    _, moved = batch_norm(params, stats, x, train=True, decay=0.0, weights=weights)
    assert_stats(found, moved.mean, moved.var)


def test_batch_norm_gathers_without_decay_or_gradient():
    params, x = init_params(3), RANDOM.normal(size=(8, 3)).astype(np.float32)

    def step(params, population, x):
        y, population = batch_norm(params, population, x, train=True, decay=0.5)
        return jnp.sum(y**3) + sum(field.sum() for field in population), population

    grads, population = jax.grad(step, argnums=(0, 2), has_aux=True)(
        params, init(init_stats(3)), x
    )
    _, population = step(params, population, 2 * x)
    both = gather([x, 2 * x])
    for found, expected in zip(population, both, strict=True):
        np.testing.assert_array_equal(found, expected)

    def loss(params, x):
        return jnp.sum(batch_norm(params, init_stats(3), x, train=True)[0] ** 3)

    plain = jax.grad(loss, argnums=(0, 1))(params, x)
    for found, expected in zip(
        jax.tree.leaves(grads), jax.tree.leaves(plain), strict=True
    ):
        np.testing.assert_array_equal(found, expected)


def test_no_gradient_flows_into_a_population():
    def total(x):
        population = update(init(init_stats(3)), moments(x))
        return sum(field.sum() for field in population)

    x = RANDOM.normal(size=(8, 3)).astype(np.float32)
    assert not np.any(jax.grad(total)(x))


def test_gathering_statistics_are_not_for_inference():
    x = np.ones((4, 3), np.float32)
    with pytest.raises(TypeError, match=r"population\.finalize"):
        batch_norm(init_params(3), init(init_stats(3)), x, train=False)
    with pytest.raises(TypeError, match=r"population\.finalize"):
        bn_jax.inference_affine(init_params(3), init(init_stats(3)), eps=1e-3)


@pytest.mark.usefixtures("x64")
def test_float64_is_kept():
    x = RANDOM.normal(1e6, 1, (50, 2))
    population = update(init(init_stats(2, jnp.float64)), moments(x))
    found = estimate(population)
    assert found.var.dtype == jnp.float64
    np.testing.assert_allclose(found.var, x.var(0, ddof=1), rtol=1e-12)


# A functional network of two layers.


def network(params, stats, x, axis_name=None):
    new = {}
    for name, layer in params.items():
        x = x @ layer["kernel"]
        x, new[name] = batch_norm(
            layer["norm"], stats[name], x, train=True, eps=1e-3, axis_name=axis_name
        )
        x = jnp.tanh(x)
    return x, new


def make_network():
    def layer(inputs, outputs):
        kernel = RANDOM.normal(size=(inputs, outputs)).astype(np.float32)
        return {"kernel": kernel, "norm": init_params(outputs)}

    return {"first": layer(3, 4), "second": layer(4, 5)}


PARAMS = make_network()
STATS = {"first": init_stats(4), "second": init_stats(5)}
BATCHES = RANDOM.normal(1, 2, (6, 16, 3)).astype(np.float32)


def expected_of_network(batches=BATCHES):
    """Each layer of the training network in float64, by Algorithm 2's formula."""
    seen = {"first": [], "second": []}
    for x in np.float64(batches):
        for name, layer in PARAMS.items():
            x = x @ np.float64(layer["kernel"])
            seen[name].append((x.mean(0), x.var(0, ddof=1)))
            x = np.tanh((x - x.mean(0)) / np.sqrt(x.var(0) + 1e-3))
    return {
        name: BatchStats(*(np.mean(field, axis=0) for field in zip(*of, strict=True)))
        for name, of in seen.items()
    }


def assert_as_expected(found, expected=None):
    for name, stats in (expected or expected_of_network()).items():
        assert isinstance(found[name], BatchStats)
        assert_stats(found[name], *stats, 2e-6)


def test_functional_network():
    @jax.jit
    def run(stats, x):
        return network(PARAMS, stats, x)[1]

    assert_as_expected(population_statistics(run, STATS, BATCHES))
    # A generator, and statistics that the old ones leave no trace in.
    old = jax.tree.map(lambda leaf: leaf + 7, STATS)
    assert_as_expected(population_statistics(run, old, iter(BATCHES)))


def test_functional_network_in_one_compiled_scan():
    @jax.jit
    def estimate(stats, batches):
        def add(gathered, x):
            return network(PARAMS, gathered, x)[1], None

        gathered, _ = jax.lax.scan(add, init(stats), batches)
        return finalize(gathered, stats)

    assert_as_expected(estimate(STATS, BATCHES))
    traced = jax.jit(
        lambda stats: population_statistics(
            lambda stats, x: network(PARAMS, stats, x)[1], stats, list(BATCHES)
        )
    )
    assert_as_expected(traced(STATS))


def share_over_pmap(stats, x):
    mapped = jax.pmap(
        lambda stats, x: network(PARAMS, stats, x, "a")[1],
        axis_name="a",
        in_axes=(None, 0),
        out_axes=None,
    )
    return mapped(stats, x.reshape(8, 2, 3))


def share_over_shard_map(stats, x, check_vma):
    mapped = jax.shard_map(
        lambda stats, x: network(PARAMS, stats, x, "a")[1],
        mesh=device_mesh(8),
        in_specs=(PartitionSpec(), PartitionSpec("a")),
        out_specs=PartitionSpec(),
        check_vma=check_vma,
    )
    return jax.jit(mapped)(stats, x)


@pytest.mark.parametrize(
    "run",
    [
        share_over_pmap,
        functools.partial(share_over_shard_map, check_vma=True),
        functools.partial(share_over_shard_map, check_vma=False),
    ],
    ids=["pmap", "checked", "unchecked"],
)
def test_eight_devices_that_share_moments_are_one(run):
    assert_as_expected(population_statistics(run, STATS, BATCHES))


def test_inside_a_map_over_devices():
    def per_device(stats, x):
        run = functools.partial(network, PARAMS, axis_name="a")
        return population_statistics(lambda stats, x: run(stats, x)[1], stats, list(x))

    mapped = jax.pmap(per_device, axis_name="a", in_axes=(None, 1), out_axes=None)
    assert_as_expected(mapped(STATS, BATCHES.reshape(6, 8, 2, 3)))


class LinenNetwork(nn.Module):
    norm: type[nn.Module] = bn_jax.linen.BatchNorm
    frozen: bool = False

    @nn.compact
    def __call__(self, x, train=True):
        for units in (4, 5):
            x = nn.Dense(units, use_bias=False)(x)
            x = nn.tanh(self.norm(not train, epsilon=1e-3)(x))
        if self.frozen:
            x = bn_jax.linen.BatchNorm(not train, frozen=True, name="frozen")(x)
        return x


def linen_run(model, params, train=True):
    @jax.jit
    def run(batch_stats, x):
        variables = {"params": params, "batch_stats": batch_stats}
        _, updated = model.apply(variables, x, train, mutable=["batch_stats"])
        return updated["batch_stats"]

    return run


def linen_variables(model):
    variables = model.init(jax.random.key(0), BATCHES[0])
    for name, layer in (("Dense_0", "first"), ("Dense_1", "second")):
        variables["params"][name]["kernel"] = jnp.asarray(PARAMS[layer]["kernel"])
    return variables["params"], variables["batch_stats"]


def as_functional(batch_stats):
    return {
        name: BatchStats(**batch_stats[f"BatchNorm_{layer}"])
        for layer, name in enumerate(STATS)
    }


def test_linen_network():
    model = LinenNetwork()
    params, stats = linen_variables(model)
    found = population_statistics(linen_run(model, params), stats, BATCHES)
    assert jax.tree.structure(found) == jax.tree.structure(stats)
    assert_as_expected(as_functional(found))
    # What it returns serves at inference.
    y = model.apply({"params": params, "batch_stats": found}, BATCHES[0], train=False)
    assert np.all(np.isfinite(y))


def test_linen_network_of_lifted_layers():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            x = nn.Dense(3, use_bias=False)(x)
            return nn.tanh(bn_jax.linen.BatchNorm(False)(x)), None

    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            blocks = nn.scan(
                nn.remat(Block),
                variable_axes={"params": 0, "batch_stats": 0},
                split_rngs={"params": True},
                length=3,
            )
            return blocks(name="blocks")(x, None)[0]

    class Unrolled(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            for layer in range(3):
                x, _ = Block(name=f"block_{layer}")(x, None)
            return x

    scanned = Scanned().init(jax.random.key(0), BATCHES[0], True)
    unrolled = {
        collection: {
            f"block_{layer}": jax.tree.map(lambda leaf, i=layer: leaf[i], of["blocks"])
            for layer in range(3)
        }
        for collection, of in scanned.items()
    }
    found, expected = (
        population_statistics(
            linen_run(model, variables["params"]), variables["batch_stats"], BATCHES
        )
        for model, variables in ((Scanned(), scanned), (Unrolled(), unrolled))
    )
    for layer in range(3):
        for name, values in expected[f"block_{layer}"]["BatchNorm_0"].items():
            own = found["blocks"]["BatchNorm_0"][name][layer]
            np.testing.assert_allclose(own, values, rtol=1e-4, atol=1e-6)


def test_layers_that_no_batch_reached_are_named():
    model = LinenNetwork(frozen=True)
    params, stats = linen_variables(model)
    stats["frozen"]["mean"] += 3
    estimate = functools.partial(
        population_statistics, linen_run(model, params), stats, BATCHES
    )
    with pytest.raises(ValueError, match=r"no batch reached frozen\. .* keep_unseen"):
        estimate()
    found = estimate(keep_unseen=True)
    assert_as_expected(as_functional(found))
    np.testing.assert_array_equal(found["frozen"]["mean"], stats["frozen"]["mean"])

    flaxs = LinenNetwork(nn.BatchNorm)
    params, stats = linen_variables(flaxs)
    with pytest.raises(ValueError, match=r"BatchNorm_0, BatchNorm_1.* are bn_jax's"):
        population_statistics(linen_run(flaxs, params), stats, BATCHES)

    model = LinenNetwork()
    params, stats = linen_variables(model)
    with pytest.raises(ValueError, match="run the model in training mode"):
        population_statistics(linen_run(model, params, train=False), stats, BATCHES)
    with pytest.raises(ValueError, match="Pass at least one batch"):
        population_statistics(linen_run(model, params), stats, [])


def test_misuse_says_what_to_do():
    def wrong(stats, x):
        return {"batch_stats": stats}

    with pytest.raises(ValueError, match=r"return updated\['batch_stats'\]"):
        population_statistics(wrong, STATS, BATCHES)
    with pytest.raises(ValueError, match="stats hold no layer"):
        population_statistics(wrong, {"kernel": jnp.ones(3)}, BATCHES)


def test_a_network_without_layers_has_no_statistics():
    assert population_statistics(lambda stats, x: stats, {}, BATCHES) == {}


class NnxNetwork(nnx.Module):
    def __init__(self, rngs, **options):
        self.layers = nnx.List()
        for inputs, units in ((3, 4), (4, 5)):
            self.layers.append(nnx.Linear(inputs, units, use_bias=False, rngs=rngs))
            norm = bn_jax.nnx.BatchNorm(units, epsilon=1e-3, rngs=rngs, **options)
            self.layers.append(norm)
        for layer, own in zip(self.layers[::2], PARAMS.values(), strict=True):
            layer.kernel[...] = jnp.asarray(own["kernel"])

    def __call__(self, x):
        for dense, norm in zip(self.layers[::2], self.layers[1::2], strict=True):
            x = jnp.tanh(norm(dense(x)))
        return x


def nnx_statistics(model):
    return {
        name: layer.read_statistics(train=False)
        for name, layer in zip(STATS, model.layers[1::2], strict=True)
    }


@nnx.jit
def nnx_run(model, x):
    return model(x)


def test_nnx_network():
    model = NnxNetwork(nnx.Rngs(0))
    structure = jax.tree.structure(nnx.state(model))
    bn_jax.nnx.population_statistics(nnx_run, model, BATCHES)
    assert_as_expected(nnx_statistics(model))
    # Nothing is left behind.
    assert jax.tree.structure(nnx.state(model)) == structure


def test_nnx_network_over_devices():
    model = NnxNetwork(nnx.Rngs(0), axis_name="a")
    mapped = nnx.jit(
        nnx.shard_map(
            lambda model, x: model(x),
            mesh=device_mesh(8),
            in_specs=(PartitionSpec(), PartitionSpec("a")),
            out_specs=PartitionSpec("a"),
        )
    )
    bn_jax.nnx.population_statistics(mapped, model, BATCHES)
    assert_as_expected(nnx_statistics(model))


def test_nnx_network_in_the_wrong_mode_is_left_as_it_was():
    model = NnxNetwork(nnx.Rngs(0))
    model.eval()
    before = nnx.clone(nnx.state(model))
    with pytest.raises(ValueError, match="no batch reached layers/1, layers/3"):
        bn_jax.nnx.population_statistics(nnx_run, model, BATCHES)
    assert jax.tree.structure(nnx.state(model)) == jax.tree.structure(before)
    bn_jax.nnx.population_statistics(nnx_run, model, BATCHES, keep_unseen=True)
    for found, old in zip(
        jax.tree.leaves(nnx.state(model)), jax.tree.leaves(before), strict=True
    ):
        np.testing.assert_array_equal(found, old)
    with pytest.raises(ValueError, match=r"no layer of bn_jax\.nnx\.BatchNorm"):
        bn_jax.nnx.population_statistics(
            nnx_run, nnx.Linear(2, 2, rngs=nnx.Rngs(0)), []
        )


def test_trees_of_layers_of_every_kind():
    stats = {
        "functional": init_stats((2, 3)),
        "flax": {"layer": {"mean": jnp.ones(4), "var": jnp.ones(4), "other": 5}},
        "no layer": {"mean": {"var": 3}},
    }
    gathered = init(stats)
    assert isinstance(gathered["functional"], PopulationMoments)
    assert {leaf.shape for leaf in gathered["functional"]} == {(2, 3)}
    assert gathered["no layer"] == stats["no layer"]
    x = RANDOM.normal(size=(8, 4)).astype(np.float32)
    layer = gathered["flax"]["layer"]
    layer["gathering"] = update(layer["gathering"], moments(x))
    found = finalize(merge(gathered, gathered), stats)
    assert jax.tree.structure(found) == jax.tree.structure(stats)
    assert_stats(
        BatchStats(*list(found["flax"]["layer"].values())[:2]),
        x.mean(0),
        x.var(0, ddof=1),
    )
    assert found["flax"]["layer"]["other"] == 5
    np.testing.assert_array_equal(found["functional"], stats["functional"])


def test_statistics_of_16_bits_are_gathered_in_32():
    # A count of 257 is none of bfloat16.
    stats = {"mean": jnp.zeros(2, jnp.bfloat16), "var": jnp.ones(2, jnp.bfloat16)}
    gathered = init(stats)
    for _ in range(257):
        part = update(gathered["gathering"], moments(jnp.eye(1, 2)))
        gathered["gathering"] = part
    np.testing.assert_array_equal(part.count, [257, 257])
    found = finalize(gathered, stats)
    assert {leaf.dtype for leaf in found.values()} == {jnp.dtype(jnp.bfloat16)}


def test_two_processes_that_share_moments_are_one():
    batches = RANDOM.normal(1, 2, (4, 12, 3)).astype(np.float32)
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    variables = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.bn_jax.population_process"]
            + [str(number) for number in (2, process, port)],
            cwd=Path(__file__).parents[2],
            env=os.environ | variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    for process in processes:
        process.stdin.write(json.dumps(batches.tolist()))
        process.stdin.close()
    outputs = []
    for process in processes:
        # Read apart: `communicate` wants to write first.
        outputs.append((process.stdout.read(), process.stderr.read()))
        process.wait()
        process.stdout.close()
        process.stderr.close()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors[-3000:]
    x, expected = np.float64(batches), {}
    for name in ("first", "second"):
        expected[name] = (x.mean((0, 1)), x.var(1, ddof=1).mean(0))
        x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-3)
        x = np.tanh(x)[..., ::-1] ** 2
    for output, _ in outputs:
        for found in json.loads(output.splitlines()[-1]):
            for name, stats in expected.items():
                assert_stats(BatchStats(*found[name]), *stats, 2e-6)
