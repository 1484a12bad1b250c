"""batch_norm under the transformations of JAX."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from bn_jax import BatchNormParams, batch_norm
from tests.bn_jax.reference import (
    Problem,
    actual_step,
    assert_close,
    assert_steps_close,
    expected_step,
    make_problem,
    plain_batch_norm,
)
from tests.bn_jax.sharing import device_mesh, step_on_device

F32 = 32 * np.finfo(np.float32).eps
F64 = 256 * np.finfo(np.float64).eps


def loss_of(problem: Problem, **options):
    """A scalar function of (params, x) and the new statistics."""

    def loss(params, x, stats=problem.stats):
        y, stats = batch_norm(params, stats, x, **options)
        return jnp.vdot(problem.dy, jnp.sin(y)), stats

    return loss


def test_jit_changes_nothing():
    problem = make_problem((6, 4, 3))
    jitted = actual_step(problem, activation="relu")
    with jax.disable_jit():
        eager = actual_step(problem, activation="relu")
    assert_steps_close(jitted, eager, F32)


def test_a_training_step_is_traced_once():
    problem = make_problem((6, 3))
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, stats, x, decay):
        loss = loss_of(problem, train=True, decay=decay)
        grad, stats = jax.grad(loss, has_aux=True)(params, x, stats)
        return jax.tree.map(lambda p, g: p - g, params, grad), stats

    params, stats = jax.tree.map(jnp.asarray, problem[:2])
    for decay in (0.5, 0.9, 0.99):
        params, stats = step(params, stats, problem.x, decay)
    assert np.isfinite(jax.tree.leaves((params, stats))).all()


def test_vmap_trains_several_models_at_once():
    problems = [make_problem((6, 3), seed=seed) for seed in range(4)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *problems)
    step = jax.jit(jax.vmap(lambda problem: step_on_device()(*problem)))
    got = step(stacked)
    for i, problem in enumerate(problems):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], got)
        assert_steps_close(one, expected_step(problem), F32)


def test_vmap_over_x_alone_gives_each_batch_its_statistics():
    problem = make_problem((6, 3))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 3)), jnp.float32)
    apply = functools.partial(batch_norm, *problem[:2], train=True)
    y, stats = jax.vmap(apply)(x)
    for i in range(2):
        expected = expected_step(problem._replace(x=x[i]))
        assert_close(y[i], expected.y, F32)
        assert_close(stats.var[i], expected.var, F32)


def test_scan_carries_the_statistics():
    problem = make_problem((6, 3))
    batches = np.random.default_rng(1).normal(2, 1, (5, 6, 3)).astype(np.float32)

    @jax.jit
    def epoch(params, stats, batches):
        def micro_step(carry, x):
            stats, total = carry
            grads, stats = jax.grad(
                loss_of(problem, train=True, decay=0.5), has_aux=True
            )(params, x, stats)
            return (stats, jax.tree.map(jnp.add, total, grads)), None

        start = stats, jax.tree.map(jnp.zeros_like, params)
        return jax.lax.scan(micro_step, start, batches)[0]

    params, stats = jax.tree.map(jnp.asarray, problem[:2])
    got_stats, got_grads = epoch(params, stats, batches)
    total = jax.tree.map(jnp.zeros_like, params)
    grad = jax.grad(loss_of(problem, train=True, decay=0.5), has_aux=True)
    for x in batches:
        grads, stats = grad(params, x, stats)
        total = jax.tree.map(jnp.add, total, grads)
    for a, b in zip(got_stats + got_grads, stats + total, strict=True):
        assert_close(a, b, F32)


def test_gradient_through_a_scan_over_layers():
    problem = make_problem((6, 3))

    def deep(normalise, params, x):
        def layer(h, _):
            return jnp.sin(normalise(params, h)), None

        return jax.lax.scan(layer, x, None, length=3)[0].sum()

    def ours(params, x):
        return batch_norm(params, problem.stats, x, train=True)[0]

    args = jax.tree.map(jnp.asarray, (problem.params, problem.x))
    got, expected = (
        jax.jit(jax.grad(functools.partial(deep, normalise), (0, 1)))(*args)
        for normalise in (ours, plain_batch_norm)
    )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert_close(a, b, 4 * F32)


@pytest.mark.parametrize("policy", [None, "dots_saveable", "everything_saveable"])
def test_checkpoint_updates_statistics_once_and_keeps_gradients(policy):
    problem = make_problem((6, 3))
    loss = loss_of(problem, train=True, decay=0.5)
    policy = policy and getattr(jax.checkpoint_policies, policy)
    remat = jax.checkpoint(loss, policy=policy)
    args = jax.tree.map(jnp.asarray, (problem.params, problem.x, problem.stats))
    for outer in (lambda f: f, jax.jit):
        got, stats = outer(jax.grad(remat, (0, 1), has_aux=True))(*args)
        expected, _ = outer(jax.grad(loss, (0, 1), has_aux=True))(*args)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            assert_close(a, b, F32)
        once = expected_step(problem, decay=0.5)
        assert_close(stats.mean, once.mean, F32)
        assert_close(stats.var, once.var, F32)


def test_checkpoint_over_devices():
    problem = make_problem((8, 3))

    def device(stats, x, dy):
        def loss(params, x):
            y, new = batch_norm(params, stats, x, train=True, axis_name="a")
            return jnp.vdot(dy, y), new

        return jax.grad(jax.checkpoint(loss), (0, 1), has_aux=True)(problem.params, x)

    split = (jnp.asarray(a).reshape(4, 2, 3) for a in (problem.x, problem.dy))
    (params_grad, dx), stats = jax.pmap(device, axis_name="a", in_axes=(None, 0, 0))(
        problem.stats, *split
    )
    expected = expected_step(problem)
    assert_close(np.asarray(dx).reshape(8, 3), expected.dx, F32)
    assert_close(np.asarray(params_grad.scale).sum(0), expected.dscale, F32)
    assert_close(stats.var[0], expected.var, F32)


@pytest.mark.parametrize("shape", [(8,), (2, 4)])
@pytest.mark.parametrize("with_weights", [False, True])
def test_jit_over_sharded_arrays_has_global_moments(shape, with_weights):
    problem = make_problem((16, 4, 3))
    weights = np.float32(np.arange(64).reshape(16, 4, 1) % 3)
    weights = weights if with_weights else None
    mesh = device_mesh(*shape)
    by_row = NamedSharding(mesh, PartitionSpec(*mesh.axis_names))
    everywhere = NamedSharding(mesh, PartitionSpec())
    state = jax.device_put(problem[:2], everywhere)
    sharded = Problem(*state, *jax.device_put(problem[2:], by_row))
    got = actual_step(sharded, weights=weights, activation="relu", unbiased=True)
    expected = expected_step(problem, weights=weights, activation="relu")
    assert len(got.y.sharding.device_set) == 8
    assert_steps_close(got, expected, F32)


def test_forward_mode_at_inference():
    problem = make_problem((6, 3))
    loss = loss_of(problem, train=False)
    args = jax.tree.map(jnp.asarray, (problem.params, problem.x))
    tangents = jax.tree.map(jnp.ones_like, args)
    _, got, _ = jax.jvp(loss, args, tangents, has_aux=True)
    grads = jax.grad(loss, (0, 1), has_aux=True)(*args)[0]
    expected = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(grads))
    assert_close(got, expected, F32)


def test_forward_mode_in_training_is_refused():
    problem = make_problem((6, 3))
    args = jax.tree.map(jnp.asarray, (problem.params, problem.x))
    with pytest.raises(TypeError, match=r"forward-mode .* custom_vjp"):
        jax.jvp(loss_of(problem, train=True), args, args, has_aux=True)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("second", [jax.jacfwd, jax.jacrev])
@pytest.mark.parametrize("relu", [False, True])
def test_second_derivatives(second, relu):
    problem = make_problem((4, 2), dtype=np.float64)
    params, stats, x, dy = jax.tree.map(jnp.asarray, problem)
    weights = jnp.array([[1.0], [0.5], [2.0], [1.0]])
    activation = "relu" if relu else None

    def ours(params, x, weights):
        y = batch_norm(
            params, stats, x, train=True, weights=weights, activation=activation
        )[0]
        return jnp.vdot(dy, jnp.sin(y))

    def plain(params, x, weights):
        y = plain_batch_norm(params, x, weights=weights, relu=relu)
        return jnp.vdot(dy, jnp.sin(y))

    got, expected = (
        jax.jit(second(jax.grad(f, (0, 1, 2)), (0, 1, 2)))(params, x, weights)
        for f in (ours, plain)
    )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert_close(a, b, F64)


@pytest.mark.usefixtures("x64")
def test_hessian_of_x():
    problem = make_problem((4, 2), dtype=np.float64)
    params, stats, x, dy = jax.tree.map(jnp.asarray, problem)

    def ours(x):
        return jnp.vdot(dy, batch_norm(params, stats, x, train=True)[0])

    def plain(x):
        return jnp.vdot(dy, plain_batch_norm(params, x))

    got, expected = (jax.jit(jax.hessian(f))(x) for f in (ours, plain))
    assert np.abs(expected).max() > 0.1
    assert_close(got, expected, F64)


@pytest.mark.parametrize("train", [True, False])
def test_no_gradient_flows_into_or_out_of_statistics(train):
    problem = make_problem((6, 3))
    args = jax.tree.map(jnp.asarray, (problem.params, problem.stats, problem.x))

    def of_statistics(params, stats, x):
        _, new = batch_norm(params, stats, x, train=train)
        return jnp.sum(new.mean) + jnp.sum(new.var * 3)

    def of_output(stats):
        return jnp.vdot(problem.dy, batch_norm(args[0], stats, args[2], train=train)[0])

    by_params, by_stats, by_x = jax.grad(of_statistics, (0, 1, 2))(*args)
    for leaf in jax.tree.leaves((by_params, by_x, jax.grad(of_output)(args[1]))):
        assert not np.any(leaf)
    if train:
        assert not np.any(jax.tree.leaves(by_stats))


def test_donated_state():
    problem = make_problem((6, 3))
    params, stats = jax.tree.map(jnp.asarray, problem[:2])
    step = jax.jit(
        lambda params, stats, x: batch_norm(params, stats, x, train=True)[1],
        donate_argnums=1,
    )
    new = step(params, stats, problem.x)
    assert_close(new.mean, expected_step(problem).mean, F32)
    assert isinstance(params, BatchNormParams)
