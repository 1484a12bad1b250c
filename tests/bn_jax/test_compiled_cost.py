"""What compiled programs do: collectives, and what is kept for the gradient."""

import math
import re
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from jax.sharding import NamedSharding, PartitionSpec

from bn_jax import MOMENTS_NAME, BatchNormParams, batch_norm
from tests.bn_jax.forms import on_platform
from tests.bn_jax.reference import lenient, make_problem
from tests.bn_jax.sharing import (
    MODES_WITH_GROUPS,
    PerDevice,
    device_mesh,
    map_devices,
    step_on_device,
)

COLLECTIVE = re.compile(
    r"= (?:\(.*?\)|\S+) (all-reduce|all-gather|all-to-all|reduce-scatter|"
    r"collective-permute|collective-broadcast|ragged-all-to-all)(?:-start)?\("
)
GROUPS = ((0, 3), (2, 1))


def count_collectives(hlo: str) -> Counter[str]:
    """Counts the instructions of a compiled program that communicate."""
    return Counter(COLLECTIVE.findall(hlo))


def test_the_count_knows_how_instructions_are_written():
    hlo = """
  %all-reduce.1 = f32[4,3]{1,0} all-reduce(%x), channel_id=1, to_apply=%add
  ROOT %r = (f32[3]{0}, f32[2]{0}) all-reduce(%y, %z), channel_id=2, to_apply=%add
  %s = (f32[3]{0}, f32[12]{0}) all-gather-start(%y), dimensions={0}
  %d = f32[12]{0} all-gather-done(%s)
  %all-gather.7 = f32[2,3]{1,0:T(4,128)} all-gather(%w), dimensions={0}
  %user = f32[3]{0} add(%all-reduce.1, %all-gather.7)
  %p = f32[3]{0} fusion(%all-reduce.1), calls=%all-reduce(
"""
    assert count_collectives(hlo) == {"all-reduce": 2, "all-gather": 2}


def collectives_of(
    mode: str, function: PerDevice, weights: np.ndarray | None
) -> Counter[str]:
    """Counts the collectives of function(params, stats, x, dy, ...) on four devices."""
    params, stats, x, dy = make_problem((16, 3))
    split = [
        jnp.asarray(a).reshape(4, 4, -1) for a in (x, dy, weights) if a is not None
    ]
    if mode == "pmap":
        in_axes = (None,) * 2 + (0,) * len(split)
        mapped = jax.pmap(function, axis_name="a", in_axes=in_axes)
    else:
        mapped = map_devices(mode, function, 4, replicated=2)
    return count_in_program(mapped.lower(params, stats, *split))


def count_in_program(lowered: jax.stages.Lowered) -> Counter[str]:
    """Counts what is written, which no compiler should have to combine to get less."""
    compiled = count_collectives(lowered.compile().as_text())
    written = Counter(
        re.findall(r"stablehlo\.(all_reduce|all_gather)", lowered.as_text())
    )
    assert written == {k.replace("-", "_"): n for k, n in compiled.items()}
    return compiled


@pytest.mark.parametrize("mode", MODES_WITH_GROUPS)
@pytest.mark.parametrize("with_weights", [False, True])
@pytest.mark.parametrize("groups", [None, GROUPS])
def test_one_collective_forward(mode, with_weights, groups):
    def forward(params, stats, x, dy, weights=None):
        return batch_norm(
            params,
            stats,
            x,
            train=True,
            weights=weights,
            axis_name="a",
            axis_index_groups=groups,
            activation="relu",
        )

    weights = np.ones((16, 1), np.float32) if with_weights else None
    counts = collectives_of(mode, forward, weights)
    assert counts == {"all-gather" if groups else "all-reduce": 1}


@pytest.mark.parametrize("mode", MODES_WITH_GROUPS)
@pytest.mark.parametrize("with_weights", [False, True])
@pytest.mark.parametrize("groups", [None, GROUPS])
def test_one_collective_more_backward(mode, with_weights, groups):
    full_step = step_on_device(
        axis_name="a", axis_index_groups=groups, activation="relu"
    )

    def step(*args):
        got = full_step(*args)
        if groups and mode == "checked":
            # JAX wants the gradients of replicated parameters summed over all groups,
            # which the other modes leave to the caller, as its part of the step.
            got = got._replace(dscale=None, dbias=None)
        return got

    weights = np.ones((16, 1), np.float32) if with_weights else None
    counts = collectives_of(mode, step, weights)
    assert counts == {"all-gather" if groups else "all-reduce": 2}


def test_two_mapped_axes_take_one_collective_too():
    params, stats, x, dy = make_problem((16, 3))
    step = step_on_device(axis_name=("a", "b"))
    none, both = PartitionSpec(), PartitionSpec(("a", "b"))

    def grads(params, stats, x, dy):
        got = step(params, stats, x, dy)
        return got.dx, got.dscale, got.mean

    mapped = jax.jit(
        jax.shard_map(
            grads,
            mesh=device_mesh(2, 4),
            in_specs=(none, none, both, both),
            out_specs=(both, none, none),
        )
    )
    counts = count_in_program(mapped.lower(params, stats, x, dy))
    assert counts == {"all-reduce": 2}


@pytest.mark.parametrize("lanes", [64, 512])
def test_one_example_a_lane_takes_no_more_memory_for_more_lanes(lanes):
    """Under vmap, what a lane receives of the others must not grow with them."""
    params, stats, x, _ = make_problem((lanes, 1, 64))

    def normalise(x):
        return batch_norm(params, stats, x, train=True, axis_name="a")

    compiled = jax.jit(jax.vmap(normalise, axis_name="a")).lower(x).compile()
    # Deviations, their squares, and each lane's moments: a few times the input.
    assert compiled.memory_analysis().temp_size_in_bytes <= 12 * x.nbytes


@pytest.mark.parametrize(("names", "expected"), [((), 3), ((MOMENTS_NAME,), 2)])
def test_rematerialisation_can_keep_the_shared_moments(names, expected):
    params, stats, x, _ = make_problem((16, 3))
    policy = jax.checkpoint_policies.save_only_these_names(*names)

    def gradient(x):
        def loss(x):
            y, _ = batch_norm(params, stats, x, train=True, axis_name="a")
            return jnp.sum(jnp.sin(y))

        return jax.value_and_grad(jax.checkpoint(loss, policy=policy))(x)

    mapped = jax.pmap(gradient, axis_name="a")
    # As written: XLA's CPU back end merges what is computed twice.
    program = mapped.lower(jnp.asarray(x).reshape(4, 4, 3)).as_text()
    assert len(re.findall(r"stablehlo\.all_reduce", program)) == expected


def test_inference_communicates_nothing():
    def infer(params, stats, x, dy):
        return batch_norm(params, stats, x, train=False, axis_name="a")[0]

    assert not collectives_of("pmap", infer, None)


def kept_arrays(function: Any, *args: Any) -> list[jax.Array]:
    """What reverse mode keeps between the forward and the backward pass."""
    return jax.tree.leaves(jax.vjp(function, *args)[1])


def large(arrays: list[jax.Array], size: int) -> list[str]:
    return sorted(str(a.dtype) for a in arrays if a.size >= size)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_only_x_is_kept_for_the_gradient(train, activation, dtype):
    params, stats, x, _ = jax.tree.map(
        jnp.asarray, make_problem((8, 4, 3), dtype=dtype)
    )

    def ours(params: BatchNormParams, x: jax.Array) -> jax.Array:
        return batch_norm(params, stats, x, train=train, activation=activation)[0]

    kept = kept_arrays(ours, params, x)
    big = [a for a in kept if a.size >= x.size]
    assert len(big) == 1
    assert big[0].dtype == dtype
    np.testing.assert_array_equal(big[0], x)
    # The rest: scale, bias, mean, variance or its inverse root, count.
    assert sum(a.size for a in kept) <= x.size + 5 * 3

    bn = linen.BatchNorm(use_running_average=not train, dtype=dtype)

    def theirs(params: BatchNormParams, x: jax.Array) -> jax.Array:
        variables = {"params": params._asdict(), "batch_stats": stats._asdict()}
        y, _ = bn.apply(variables, x, mutable=["batch_stats"])
        return jax.nn.relu(y) if activation else y

    if train or dtype != jnp.float32:  # else there is no less to keep
        with lenient():
            flax_bytes = sum(a.nbytes for a in kept_arrays(theirs, params, x))
        assert sum(a.nbytes for a in kept) < flax_bytes


def test_weights_are_the_only_other_large_thing_kept():
    params, stats, x, _ = jax.tree.map(
        jnp.asarray, make_problem((8, 4, 3), dtype=jnp.bfloat16)
    )
    weights = jnp.ones((8, 4, 3))

    def ours(params, x):
        return batch_norm(
            params, stats, x, train=True, weights=weights, activation="relu"
        )[0]

    assert large(kept_arrays(ours, params, x), x.size) == ["bfloat16", "float32"]


def training_step(forward: Any) -> Any:
    """Forward and backward pass of forward(params, x) -> y, as one program."""

    def step(params: Any, x: jax.Array, dy: jax.Array) -> Any:
        y, pullback = jax.vjp(forward, params, x)
        return y, pullback(dy)

    return step


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_only_results_are_written_to_memory(dtype):
    shape = (32, 28, 28, 16)
    params, stats, x, dy = jax.tree.map(jnp.asarray, make_problem(shape, dtype=dtype))

    def ours(params: BatchNormParams, x: jax.Array) -> jax.Array:
        return batch_norm(params, stats, x, train=True, activation="relu")[0]

    compiled = jax.jit(training_step(ours)).lower(params, x, dy).compile()
    # The parts' sums: an eighth, of two arrays of float32.
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert temporary <= 0.27 * x.size * 4

    bn = linen.BatchNorm(use_running_average=False, dtype=dtype)

    def theirs(params: BatchNormParams, x: jax.Array) -> jax.Array:
        variables = {"params": params._asdict(), "batch_stats": stats._asdict()}
        return jax.nn.relu(bn.apply(variables, x, mutable=["batch_stats"])[0])

    with lenient():
        flax = jax.jit(training_step(theirs)).lower(params, x, dy).compile()
    assert temporary <= flax.memory_analysis().temp_size_in_bytes / 2


@pytest.mark.parametrize("shape", [(32, 14, 14, 8), (32, 3, 2, 8), (4096, 8)])
@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_a_divided_batch_stays_where_it_is(platform, shape):
    """Under jit over sharded arrays, only sums over the devices are communicated."""
    split = NamedSharding(device_mesh(4), PartitionSpec("a"))
    problem = make_problem(shape)

    def loss(params, x):
        y, _ = batch_norm(params, problem.stats, x, train=True, activation="relu")
        return jnp.sum(y**2)

    x = jax.device_put(problem.x, split)
    gradient = on_platform(platform, jax.grad(loss, argnums=(0, 1)))
    params = jax.device_put(problem.params, NamedSharding(split.mesh, PartitionSpec()))
    lowered = jax.jit(gradient).lower(params, x)
    for line in lowered.compile().as_text().splitlines():
        if found := COLLECTIVE.search(line):
            assert found[1] in ("all-reduce", "all-gather")
            sizes = re.findall(r"f32\[([\d,]*)\]", line.split(" all-")[0])
            assert sizes
            for size in sizes:
                assert math.prod(map(int, size.split(","))) <= 4 * shape[-1]
