"""What the page of the API shows works as it stands there, and nothing is left out."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import bn_jax
import bn_jax.linen
import bn_jax.nnx

PAGE = Path(__file__).parents[1] / "docs" / "api.md"
CORE, MORE, FLAX = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_the_api_in_one_screen():
    def run(x: jax.Array, mask: jax.Array) -> Any:
        names = {"x": x, "mask": mask, "other": bn_jax.moments(x)}
        exec(CORE, names)
        return [names[name] for name in ("y", "stats", "scale", "shift", "moments")]

    x = jax.random.normal(jax.random.key(0), (2, 8, 64))
    mapped = jax.vmap(run, axis_name="devices")
    y, stats, scale, shift, moments = mapped(x, jnp.ones((2, 8, 1)))
    assert y.shape == x.shape
    # The last y is that of inference, and moments are those of x and of x again.
    expected = x * scale[:, None] + shift[:, None]
    assert jnp.allclose(y, expected, atol=1e-5)
    assert (moments.count == 16).all()
    assert jnp.allclose(moments.mean, x.mean(1), atol=1e-6)
    assert stats.mean.shape == (2, 64)


def test_beyond_one_batch():
    params, stats = bn_jax.init_params(8), bn_jax.init_stats(8)
    batches = jax.random.normal(jax.random.key(0), (4, 64, 8)) + 3

    def run(stats: Any, x: jax.Array) -> Any:
        return bn_jax.batch_norm(params, stats, x, train=True)[1]

    def loss_function(params: Any, stats: Any, x: jax.Array) -> Any:
        y, stats = bn_jax.batch_norm(params, stats, x, train=True)
        return jnp.sum(y**3), stats

    names = {
        **{"bn_jax": bn_jax, "params": params, "stats": stats, "run": run},
        **{"batches": batches, "x": batches[0], "loss_function": loss_function},
        **{"parts": batches, "kernel": jnp.ones((3, 3, 4, 8)), "bias": None},
    }
    exec(MORE, names)
    # Of the population, then moved by one batch each, and by all of them.
    assert jnp.allclose(names["stats"].mean, batches.mean((0, 1)), atol=0.05)
    assert names["kernel"].shape == (3, 3, 4, 8)
    assert names["bias"].shape == (8,)
    assert names["y"].shape == (64, 8)
    assert names["grads"].scale.shape == (8,)


def test_flax_modules():
    names: dict[str, Any] = {}
    exec(FLAX, names)
    assert names["BatchNorm"] is bn_jax.nnx.BatchNorm
    assert callable(names["fold_batch_norms"])


def test_everything_public_is_named():
    text = PAGE.read_text()
    shown = {
        name
        for name in bn_jax.__all__
        if f"bn_jax.{name}" in text or f"{name}(" in text
    }
    assert shown == set(bn_jax.__all__)
