"""Called without jit, nothing is compiled after the first time, and no memory grows."""

import gc
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bn_jax
import bn_jax.linen
import bn_jax.nnx

PARAMS, STATS = bn_jax.init_params(8), bn_jax.init_stats(8)
X = jnp.asarray(np.random.default_rng(0).normal(size=(32, 8)), jnp.float32)


def gradient(**options: Any) -> Any:
    def loss(x: jax.Array) -> jax.Array:
        return bn_jax.batch_norm(PARAMS, STATS, x, train=True, **options)[0].sum()

    return jax.grad(loss)(X)


def linen(train: bool) -> Callable[[], Any]:
    model = bn_jax.linen.BatchNorm(use_running_average=not train)
    variables = model.init(jax.random.key(0), X)
    return lambda: model.apply(variables, X, mutable=["batch_stats"])


def of_nnx(train: bool) -> Callable[[], Any]:
    model = bn_jax.nnx.BatchNorm(8, use_running_average=not train, rngs=nnx.Rngs(0))
    return lambda: model(X)


CALLS: dict[str, Callable[[], Any]] = {
    "training": lambda: bn_jax.batch_norm(PARAMS, STATS, X, train=True),
    "training with NumPy": lambda: bn_jax.batch_norm(
        PARAMS, STATS, np.asarray(X), train=True, weights=np.ones((32, 1))
    ),
    "inference": lambda: bn_jax.batch_norm(PARAMS, STATS, X, train=False),
    "activation": lambda: bn_jax.batch_norm(
        PARAMS, STATS, X, train=True, activation="gelu"
    ),
    "gradient": gradient,
    "gradient with weights": lambda: gradient(weights=jnp.ones((32, 1))),
    "renormalisation": lambda: bn_jax.batch_renorm(
        PARAMS, STATS, X, train=True, r_max=3.0, d_max=5.0
    ),
    "ghost": lambda: bn_jax.ghost_batch_norm(
        PARAMS, STATS, X, train=True, virtual_batch_size=8
    ),
    "moments": lambda: bn_jax.moments(X),
    "affine": lambda: bn_jax.inference_affine(PARAMS, STATS, eps=1e-5),
    "linen, training": linen(True),
    "linen, inference": linen(False),
    "nnx, training": of_nnx(True),
    "nnx, inference": of_nnx(False),
}


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """The names of the events of compiling, as they come."""
    events: list[str] = []

    def record(name: str, *_: Any, **__: Any) -> None:
        if "backend_compile" in name:
            events.append(name)

    jax.monitoring.register_event_duration_secs_listener(record)
    yield events
    jax.monitoring.clear_event_listeners()


def test_the_fixture_sees_what_is_compiled(compilations):
    jax.jit(lambda x: x + 12345)(X)
    assert compilations


@pytest.mark.parametrize("name", CALLS)
def test_nothing_is_compiled_after_the_first_call(name, compilations):
    CALLS[name]()
    compilations.clear()
    for _ in range(5):
        CALLS[name]()
    assert compilations == []


def test_a_decay_that_changes_compiles_nothing(compilations):
    for decay in (0.9, 0.99):
        bn_jax.batch_norm(PARAMS, STATS, X, train=True, decay=decay)
    compilations.clear()
    for decay in np.linspace(0.5, 0.9, 5):
        bn_jax.batch_norm(PARAMS, STATS, X, train=True, decay=float(decay))
    assert compilations == []


@pytest.mark.parametrize("name", CALLS)
def test_no_array_is_kept(name):
    CALLS[name]()
    gc.collect()
    before = len(jax.live_arrays())
    for _ in range(5):
        CALLS[name]()
    gc.collect()
    assert len(jax.live_arrays()) <= before


def test_a_flax_model_trains_eagerly(compilations):
    model = nn.Sequential([nn.Dense(8), bn_jax.linen.BatchNorm(False)])
    variables = model.init(jax.random.key(0), X)

    def loss(params, stats):
        y, updated = model.apply(
            {"params": params, "batch_stats": stats}, X, mutable=["batch_stats"]
        )
        return jnp.sum(y**2), updated["batch_stats"]

    stats = variables["batch_stats"]
    for turn in range(4):
        if turn == 2:
            compilations.clear()
        _, stats = jax.grad(loss, has_aux=True)(variables["params"], stats)
    assert compilations == []
