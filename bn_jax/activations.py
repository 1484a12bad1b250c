"""Activations fused into the transform, whose gradient needs no more than x."""

import functools
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

ActivationName = Literal["relu", "relu6", "leaky_relu", "silu", "gelu"]


class Activation(NamedTuple):
    """An activation, and how its gradient is computed from its input z = scaled + bias.

    The cotangent g of z is that of the output times `slope(z)`, and 0 where
    `passes(scaled, bias)` is False; either may be None. Both return arrays of z's
    shape.
    """

    apply: Callable[[jax.Array], jax.Array]
    passes: Callable[[jax.Array, jax.Array], jax.Array] | None = None
    slope: Callable[[jax.Array], jax.Array] | None = None


def _derivative(function: Callable[[jax.Array], jax.Array], z: jax.Array) -> jax.Array:
    _, derivative = jax.jvp(function, (z,), (jnp.ones_like(z),))
    return derivative


def _relu(z: jax.Array) -> jax.Array:
    return jnp.maximum(z, 0)


ACTIVATIONS: Mapping[ActivationName, Activation] = {
    # That z > 0. The less a mask costs to compute, the more loops XLA computes it in,
    # in place of storing it: this takes one addition less.
    "relu": Activation(_relu, passes=lambda scaled, bias: scaled > -bias),
    "relu6": Activation(
        lambda z: jnp.clip(z, 0, 6),
        passes=lambda scaled, bias: (scaled > -bias) & (scaled < 6 - bias),
    ),
    "leaky_relu": Activation(
        jax.nn.leaky_relu, slope=lambda z: jnp.where(z >= 0, 1.0, 0.01).astype(z.dtype)
    ),
    "silu": Activation(jax.nn.silu, slope=functools.partial(_derivative, jax.nn.silu)),
    "gelu": Activation(jax.nn.gelu, slope=functools.partial(_derivative, jax.nn.gelu)),
}
assert set(ACTIVATIONS) == set(get_args(ActivationName))
IDENTITY = Activation(lambda z: z)


def activation_of(name: ActivationName | None) -> Activation:
    """The activation of a name, which has been checked; None is the identity."""
    return IDENTITY if name is None else ACTIVATIONS[name]
