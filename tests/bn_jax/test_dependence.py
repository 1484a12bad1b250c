"""How many layers wait for one another, in networks of known depth."""

import jax
import jax.numpy as jnp
import pytest
from jax.ad_checkpoint import checkpoint_name

from bn_jax.dependence import INDEPENDENT, count, depths

X = jnp.ones(3)


def layer(x):
    return 2 * checkpoint_name(x, "layer 3")


def chain(x):
    return layer(layer(jnp.sin(layer(x))))


def residual(x):
    """A block's own branch is deeper than the way around it."""
    y = layer(x)
    return y + layer(layer(y)), y, x


def scanned(x):
    """Two layers an iteration, and a result of each iteration."""
    return jax.lax.scan(lambda x, _: (layer(layer(x)), layer(x)), x, length=4)


def carried_late(x):
    """The batch reaches the layers only in the second iteration."""

    def body(carry, _):
        first, second, third = carry
        return (first, first, layer(second + third)), None

    return jax.lax.scan(body, (x, jnp.zeros(3), jnp.zeros(3)), length=5)[0]


def branches(x):
    return jax.lax.cond(x[0] > 0, layer, lambda x: layer(layer(x)), x)


@jax.custom_vjp
def with_own_gradient(x):
    return layer(x)


with_own_gradient.defvjp(
    lambda x: (with_own_gradient(x), None), lambda _, cotangent: (cotangent,)
)


@pytest.mark.parametrize(
    ("network", "expected", "features"),
    [
        (lambda x: (x, jnp.ones(2), X.sum()), [0, INDEPENDENT, INDEPENDENT], 0),
        (chain, [3], 9),
        (residual, [3, 1, 0], 9),
        (lambda x: layer(jnp.ones(4)) + x[0], [1], 3),
        (scanned, [8, 7], 36),
        (carried_late, [0, 0, 5], 15),
        (lambda x: jax.lax.scan(lambda x, _: (layer(x), x), x, length=0), [0, -1], 0),
        (branches, [2], 6),
        (jax.jit(jax.checkpoint(scanned)), [8, 7], 36),
        (lambda x: with_own_gradient(layer(x)), [2], 6),
        (jax.vmap(chain), [3], 9),
        (lambda x: jax.lax.while_loop(lambda x: x[0] < 1, jnp.sin, layer(x)), [1], 3),
    ],
)
def test_depths(network, expected, features):
    jaxpr = jax.make_jaxpr(network)(X).jaxpr
    assert depths(jaxpr, [0], "layer") == expected
    assert count(jaxpr, lambda name: int(name.split()[1])) == features


def test_a_loop_of_unknown_length():
    def network(x):
        return jax.lax.while_loop(lambda x: x[0] < 1, layer, x)

    with pytest.raises(ValueError, match="within while"):
        depths(jax.make_jaxpr(network)(X).jaxpr, [0], "layer")
