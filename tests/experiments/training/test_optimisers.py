import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.configuration.fields import ConfigError
from experiments.training.optimisers import (
    OPTIMISERS,
    SCHEDULES,
    is_call,
    make_optimiser,
    make_schedule,
    parse_call,
    with_learning_rate,
)

PARAMS = {"dense": {"kernel": jnp.full((3, 2), 0.5), "bias": jnp.ones(2)}}
GRADIENT = jax.tree.map(lambda leaf: 0.1 * jnp.ones_like(leaf), PARAMS)
STEPS = np.arange(0, 1_000, 7)


def update_of(optimiser, rate=0.1):
    state = optimiser.init(PARAMS)
    if hasattr(state, "hyperparams"):
        state = with_learning_rate(state, rate)
    updates, _ = optimiser.update(GRADIENT, state, PARAMS)
    return updates


@pytest.mark.parametrize(
    ("text", "defaults", "expected"),
    [
        ("sgd", {}, optax.sgd(0.1)),
        ("sgd", {"momentum": 0.9}, optax.sgd(0.1, 0.9)),
        ("sgd(nesterov=True)", {"momentum": 0.9}, optax.sgd(0.1, 0.9, nesterov=True)),
        ("lars(weight_decay=0.5)", {}, optax.lars(0.1, weight_decay=0.5)),
        ("adamw", {"momentum": 0.9}, optax.adamw(0.1)),
        ("adamw(weight_decay=0.5)", {}, optax.adamw(0.1, weight_decay=0.5)),
    ],
)
def test_optimisers_are_those_of_optax(text, defaults, expected):
    found = update_of(make_optimiser(text, **defaults))
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5),
        found,
        update_of(expected),
    )


def test_the_rate_of_a_state_leaves_other_hyperparameters_alone():
    injected = optax.inject_hyperparams(optax.adamw)(0.1, weight_decay=0.5)
    state = with_learning_rate(injected.init(PARAMS), 0.3)
    assert state.hyperparams["learning_rate"] == np.float32(0.3)
    assert state.hyperparams["weight_decay"] == 0.5


@pytest.mark.parametrize(
    "text",
    ["adam", "", "3", "sgd(0.9)", "sgd(speed=1)", "sgd(", "sgd.x", "open('/etc')"],
)
def test_other_words_are_refused(text):
    assert not is_call(text, OPTIMISERS)
    with pytest.raises(ValueError, match=r"expected one of|no argument"):
        parse_call(text, OPTIMISERS)


def test_names_with_arguments():
    assert parse_call("lars(weight_decay=1e-4, nesterov=True)", OPTIMISERS) == (
        "lars",
        {"weight_decay": 1e-4, "nesterov": True},
    )
    assert all(is_call(name, SCHEDULES) for name in SCHEDULES)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("constant", optax.constant_schedule(1.0)),
        (
            "staircase(transition_steps=100, decay_rate=0.5)",
            optax.exponential_decay(1.0, 100, 0.5, staircase=True),
        ),
        ("linear(transition_steps=500)", optax.linear_schedule(1.0, 0.0, 500)),
        ("cosine(alpha=0.1)", optax.cosine_decay_schedule(1.0, 800, 0.1)),
    ],
)
def test_schedules_are_those_of_optax(text, expected):
    schedule = make_schedule(text, cosine={"decay_steps": 800})
    by_optax = np.array([float(expected(int(step))) for step in STEPS])
    np.testing.assert_allclose(schedule(STEPS), by_optax, rtol=1e-5, atol=1e-6)
    warmed_up = make_schedule(text, 50, cosine={"decay_steps": 800})
    joined = optax.join_schedules([optax.linear_schedule(0, 1, 50), expected], [50])
    by_optax = np.array([float(joined(int(step))) for step in STEPS])
    np.testing.assert_allclose(warmed_up(STEPS), by_optax, rtol=1e-5, atol=1e-6)


def test_a_missing_argument_is_named():
    with pytest.raises(ConfigError, match=r"--config.schedule=cosine: .*decay_steps"):
        make_schedule("cosine")


# The gradient of a parabola depends on where it is taken.
def slope(params):
    return jax.tree.map(lambda leaf: 2 * leaf - 1, params)


def descend(steps, gradient_delay, **options):
    """All parameters on the way."""
    optimiser = make_optimiser(gradient_delay=gradient_delay, **options)
    state, params, way = optimiser.init(PARAMS), PARAMS, [PARAMS]
    for _ in range(steps):
        state = with_learning_rate(state, 0.1)
        updates, state = optimiser.update(slope(params), state, params)
        params = optax.apply_updates(params, updates)
        way.append(params)
    return way


@pytest.mark.parametrize("delay", [0, 1, 2, 5])
def test_late_gradients_are_those_of_older_parameters(delay):
    """A loop by hand, with momentum and the penalty on weights, in float64."""
    way = descend(12, delay, momentum=0.9, l2_weight=0.3)
    for part, penalty in (("kernel", 0.3), ("bias", 0.0)):
        weights = [np.asarray(PARAMS["dense"][part], np.float64)]
        momentum = np.zeros_like(weights[0])
        for step in range(12):
            if step >= delay:
                old = weights[step - delay]
                momentum = 0.9 * momentum + 2 * old - 1 + penalty * old
            weights.append(weights[-1] - 0.1 * momentum)
        found = [np.asarray(params["dense"][part]) for params in way]
        np.testing.assert_allclose(found, weights, rtol=1e-5, atol=1e-6)


def test_without_a_delay_nothing_is_kept():
    states = [
        make_optimiser(l2_weight=0.1, **late).init(PARAMS)
        for late in ({}, {"gradient_delay": 0})
    ]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
