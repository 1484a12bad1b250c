"""Optax's optimisers and schedules, by name with their arguments."""

import ast
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.configuration.fields import ConfigError
from experiments.training.delay import delayed

OPTIMISERS: Mapping[str, Callable[..., optax.GradientTransformation]] = {
    "sgd": optax.sgd,
    "lars": optax.lars,
    "adamw": optax.adamw,
}


# Shares of the initial rate, of numbers of steps done: NumPy arrays both.
Schedule = Callable[[np.ndarray], np.ndarray]


def _staircase(
    transition_steps: float, decay_rate: float, speed: float = 1.0
) -> Schedule:
    """As optax.exponential_decay, which would count millions of steps in float32."""
    # In this order a whole number of decays is one after rounding, too.
    return lambda steps: decay_rate ** np.floor(steps * speed / transition_steps)


def _linear(transition_steps: int, end_value: float = 0.0) -> Schedule:
    return _on_host(optax.linear_schedule(1.0, end_value, transition_steps))


def _cosine(decay_steps: int, alpha: float = 0.0) -> Schedule:
    return _on_host(optax.cosine_decay_schedule(1.0, decay_steps, alpha))


def _on_host(schedule: optax.Schedule) -> Schedule:
    compiled = jax.jit(jax.vmap(schedule))
    return lambda steps: np.asarray(compiled(steps), np.float64)


SCHEDULES: Mapping[str, Callable[..., Schedule]] = {
    "constant": lambda: np.ones_like,
    "staircase": _staircase,
    "linear": _linear,
    "cosine": _cosine,
}

# Arguments that are the number of a run's steps where a text has none.
LENGTHS = {"linear": "transition_steps", "cosine": "decay_steps"}


def spread_over(text: str) -> str:
    """The argument of a schedule that follows from the run's length; empty if none.

    Args:
      text: a name of `SCHEDULES`, with arguments or without.
    """
    name, arguments = parse_call(text, SCHEDULES)
    length = LENGTHS.get(name, "")
    return "" if length in arguments else length


def is_call(text: Any, table: Mapping[str, Callable[..., Any]]) -> bool:
    """Whether it is a name of a table, alone or with arguments that are known."""
    try:
        parse_call(text, table)
    except ValueError:
        return False
    return True


def parse_call(
    text: Any, table: Mapping[str, Callable[..., Any]]
) -> tuple[str, dict[str, Any]]:
    """Takes "name(argument=value, ...)", or a name alone, apart.

    Raises:
      ValueError: it is neither, or the name or an argument is unknown.
    """
    try:
        call = ast.parse(str(text), mode="eval").body
    except SyntaxError:
        raise ValueError(f"{text}: expected one of {', '.join(table)}") from None
    keywords = call.keywords if isinstance(call, ast.Call) and not call.args else []
    name = call.func if isinstance(call, ast.Call) and not call.args else call
    if not isinstance(name, ast.Name) or name.id not in table:
        raise ValueError(f"{text}: expected one of {', '.join(table)}")
    arguments = {str(each.arg): ast.literal_eval(each.value) for each in keywords}
    if unknown := arguments.keys() - inspect.signature(table[name.id]).parameters:
        raise ValueError(f"{name.id} has no argument {', '.join(sorted(unknown))}")
    return name.id, arguments


def make_optimiser(
    text: str = "sgd", l2_weight: float = 0.0, gradient_delay: int = 0, **defaults: Any
) -> optax.GradientTransformation:
    """An optimiser whose learning rate is part of its state.

    So that one compiled step serves runs of several rates, side by side or after one
    another.

    Args:
      text: a name of `OPTIMISERS`, with arguments or without.
      l2_weight: the penalty l2_weight / 2 * |w|^2 is part of the loss, for the weights
        w of dense and convolutional layers.
      gradient_delay: take the gradient, the penalty's too, of so many steps before.
      **defaults: arguments where the text has none, of those that the optimiser knows.
    """
    name, arguments = parse_call(text, OPTIMISERS)
    known = inspect.signature(OPTIMISERS[name]).parameters
    chosen = {key: defaults[key] for key in defaults.keys() & known} | arguments

    def with_rate(learning_rate: float | jax.Array) -> optax.GradientTransformation:
        steps = [OPTIMISERS[name](learning_rate, **chosen)]
        if gradient_delay:
            steps.insert(0, delayed(gradient_delay))
        if l2_weight:
            # Before momentum: the gradient of the penalty is part of the gradient.
            steps.insert(0, optax.add_decayed_weights(l2_weight, mask=_is_kernel))
        return optax.chain(*steps) if len(steps) > 1 else steps[0]

    return optax.inject_hyperparams(with_rate)(learning_rate=0.0)


def make_schedule(
    text: str, warmup_steps: int = 0, **defaults: Mapping[str, Any]
) -> Schedule:
    """What the learning rate is multiplied by, of the number of steps done.

    Args:
      text: a name of `SCHEDULES`, with arguments or without.
      warmup_steps: that the rate first rises over, from 0; the schedule follows.
      **defaults: arguments of each schedule where the text has none.

    Raises:
      ConfigError: an argument is missing.
    """
    name, arguments = parse_call(text, SCHEDULES)
    try:
        schedule = SCHEDULES[name](**{**defaults.get(name, {}), **arguments})
    except TypeError as error:
        raise ConfigError(f"--config.schedule={text}: {error}.") from None
    if not warmup_steps:
        return lambda steps: schedule(np.asarray(steps, np.float64))

    def warmed_up(steps: np.ndarray) -> np.ndarray:
        later = schedule(np.maximum(np.asarray(steps, float) - warmup_steps, 0))
        return np.where(steps < warmup_steps, steps / warmup_steps, later)

    return warmed_up


def with_learning_rate(
    opt_state: optax.OptState, learning_rate: float | jax.Array
) -> optax.OptState:
    """Sets the rate of a state of `make_optimiser`'s; it may be traced."""
    rate = jnp.asarray(learning_rate, jnp.float32)
    hyperparams = opt_state.hyperparams | {"learning_rate": rate}
    return opt_state._replace(hyperparams=hyperparams)


def _is_kernel(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key.endswith("kernel"), params
    )


PLAIN_SGD = make_optimiser()
