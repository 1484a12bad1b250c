"""Folding whole nnx models: outputs, programs, reports."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bn_jax.nnx
from bn_jax.nnx_folding import FoldedBatchNorm, fold_batch_norms
from tests.bn_jax.reference import lenient


@pytest.fixture(autouse=True)
def flax_promotes():
    with lenient():
        yield


def trained(model: Any) -> Any:
    """Gives normalisations values as after training: none is 0 or 1."""
    rng = np.random.default_rng(0)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.BatchNorm):
            for name in ("scale", "var", "bias", "mean"):
                variable = getattr(module, name)
                if variable is None:
                    continue
                low = 0.5 if name in ("scale", "var") else -1
                drawn = rng.uniform(low, 2, variable.shape)
                variable[...] = jnp.asarray(drawn, variable.dtype)
    model.eval()
    return model


def images() -> jax.Array:
    return jax.random.normal(jax.random.key(1), (2, 9, 9, 4))


class Network(nnx.Module):
    """Layers in attributes and in lists, with and without biases."""

    def __init__(self, batch_norm: Any, rngs: nnx.Rngs, **options: Any) -> None:
        self.conv = nnx.Conv(4, 8, (3, 3), use_bias=False, rngs=rngs)
        self.norm = batch_norm(8, rngs=rngs, **options)
        self.blocks = nnx.List(
            [
                nnx.Conv(8, 8, (3, 3), feature_group_count=8, rngs=rngs),
                batch_norm(8, rngs=rngs),
                nnx.ConvTranspose(8, 3, (2, 2), rngs=rngs),
                batch_norm(3, use_scale=False, use_bias=False, rngs=rngs),
            ]
        )
        self.head = nnx.Sequential(
            nnx.Linear(3, 5, rngs=rngs), batch_norm(5, rngs=rngs), nnx.tanh
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm(self.conv(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.mark.parametrize("batch_norm", [nnx.BatchNorm, bn_jax.nnx.BatchNorm])
def test_a_folded_network_computes_the_same(batch_norm):
    model, x = trained(Network(batch_norm, nnx.Rngs(0))), images()
    before = jax.tree.leaves(nnx.state(model))
    folded, report = fold_batch_norms(model, x)
    assert [str(finding) for finding in report] == [
        "norm: folded into conv",
        "blocks.1: folded into blocks.0",
        "blocks.3: folded into blocks.2",
        "head.layers.1: folded into head.layers.0",
    ]
    expected, y = model(x), folded(x)
    assert jnp.abs(y - expected).max() < 1e-5 * jnp.abs(expected).max()
    after = jax.tree.leaves(nnx.state(model))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert not any(isinstance(m, nnx.BatchNorm) for _, m in nnx.iter_modules(folded))
    assert not jax.tree.leaves(nnx.state(folded, nnx.BatchStat))
    graph, state = nnx.split(folded)
    lowered = jax.jit(lambda state, x: nnx.merge(graph, state)(x)).lower(state, x)
    operations = set(re.findall(r"stablehlo\.(\w+)", lowered.as_text()))
    assert not operations & {"rsqrt", "sqrt", "multiply", "subtract", "divide"}


def test_fused_activation_stays():
    model = trained(Network(bn_jax.nnx.BatchNorm, nnx.Rngs(0), activation="relu"))
    folded, _ = fold_batch_norms(model, images())
    assert folded.norm.activation == "relu"
    np.testing.assert_allclose(folded(images()), model(images()), atol=1e-5)


class Odd(nnx.Module):
    """Where normalisations cannot be folded."""

    def __init__(self, kind: str, rngs: nnx.Rngs) -> None:
        self.kind = kind
        layer = nnx.LoRALinear if kind == "derived" else nnx.Linear
        options = {"lora_rank": 2} if kind == "derived" else {}
        self.dense = layer(4, 4, rngs=rngs, **options)
        self.norm = nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x: jax.Array) -> Any:
        if self.kind == "input":
            return self.norm(x)
        if self.kind == "shared layer":
            return self.norm(self.dense(self.dense(x)))
        if self.kind == "shared norm":
            return self.norm(self.dense(x)) + self.norm(self.dense(-x))
        y = self.dense(x)
        if self.kind == "activation":
            return self.norm(nnx.relu(y))
        if self.kind == "residual":
            return self.norm(y) + y
        if self.kind == "mask":
            return self.norm(y, mask=jnp.ones((2, 9, 9, 1), bool))
        return self.norm(y)


REASONS = {
    "input": "its input is one of the model",
    "shared layer": "dense is called more than once",
    "shared norm": "it is called more than once",
    "activation": "its input is a result of relu, not of a layer",
    "residual": "the output of dense is used elsewhere, too",
    "mask": "it is called with a mask",
    "derived": "its input is a result of add, not of a layer",
}


@pytest.mark.parametrize("kind", REASONS)
def test_what_cannot_be_folded_stays_and_says_why(kind):
    model = trained(Odd(kind, nnx.Rngs(0)))
    folded, (finding,) = fold_batch_norms(model, images())
    assert (finding.norm, finding.layer) == ("norm", None)
    assert re.search(REASONS[kind], finding.reason), finding.reason
    assert isinstance(folded.norm, nnx.BatchNorm)
    np.testing.assert_array_equal(folded(images()), model(images()))


def test_every_reference_to_a_folded_normalisation_is_replaced():
    class Twice(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(4, 4, rngs=rngs)
            self.alias = self.norm = nnx.BatchNorm(4, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.dense(x))

    model = trained(Twice(nnx.Rngs(0)))
    folded, _ = fold_batch_norms(model, images())
    assert isinstance(folded.norm, FoldedBatchNorm)
    assert folded.alias is folded.norm
    np.testing.assert_allclose(folded(images()), model(images()), atol=1e-5)


def test_training_mode_is_an_error():
    model = trained(Network(nnx.BatchNorm, nnx.Rngs(0)))
    model.train()
    with pytest.raises(ValueError, match="norm normalises by the batch"):
        fold_batch_norms(model, images())


def test_saved_and_restored(tmp_path):
    model = trained(Network(nnx.BatchNorm, nnx.Rngs(0)))
    folded, _ = fold_batch_norms(model, images())
    graph, state = nnx.split(folded)
    leaves, structure = jax.tree.flatten(state)
    np.savez(tmp_path / "folded.npz", *leaves)
    with np.load(tmp_path / "folded.npz") as file:
        restored = jax.tree.unflatten(structure, [file[name] for name in file])
    again = nnx.merge(graph, restored)
    np.testing.assert_array_equal(again(images()), folded(images()))
