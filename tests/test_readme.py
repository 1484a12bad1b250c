"""What the README shows works as it stands there."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import bn_jax
import bn_jax.linen

README = Path(__file__).parents[1] / "README.md"


def test_the_api_in_one_screen():
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)

    def run(x: jax.Array, mask: jax.Array) -> Any:
        names = {"x": x, "mask": mask, "other": bn_jax.moments(x)}
        exec(code, names)
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


def test_everything_public_is_named():
    text = README.read_text()
    shown = {
        name
        for name in bn_jax.__all__
        if f"bn_jax.{name}" in text or f"{name}(" in text
    }
    assert shown == set(bn_jax.__all__)


def test_files_of_the_architecture_exist():
    listed = re.findall(
        r"\b(\w+\.py)\b", README.read_text().split("## Architecture")[1]
    )
    folders = [README.parent / name for name in ("bn_jax", "experiments")]
    for name in listed:
        assert any(list(folder.rglob(name)) for folder in folders), name
    modules = {
        path.name
        for folder in folders
        for path in folder.glob("*.py")
        if path.name != "__init__.py"
    }
    assert modules <= set(listed)
