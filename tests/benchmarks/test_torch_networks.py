"""Torch's networks are those that ours are compared with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import network
from experiments.inception.network import Inception

torch = pytest.importorskip("torch", reason="torch comes with the extra `peers`")
torch_networks = pytest.importorskip("benchmarks.torch_networks")


def num_parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_inception_has_the_parameters_of_ours_but_for_the_first_convolution():
    init = Inception(norm=network.FlaxNorm, separable_stem=False).init
    shapes = jax.eval_shape(
        lambda key: init(key, jnp.zeros((1, 64, 64, 3)), train=True), jax.random.key(0)
    )
    ours = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
    assert num_parameters(torch_networks.inception(1000, 1.0, 224)) == ours


def test_resnet_50_has_its_parameters():
    assert num_parameters(torch_networks.resnet50(1000, 1.0, 224)) == 25_557_032


@pytest.mark.parametrize("name", torch_networks.NETWORKS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_changes_the_parameters(name, dtype, monkeypatch):
    made = []

    def make(*arguments):
        made.append(torch_networks.__dict__[name](*arguments))
        return made[-1]

    monkeypatch.setitem(torch_networks.NETWORKS, name, make)
    images = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)
    step = torch_networks.training_step(
        *(name, 1 / 16, images, np.arange(2)), dtype=dtype, compiled=False
    )
    before = [parameter.detach().clone() for parameter in made[0].parameters()]
    step()
    after = list(made[0].parameters())
    assert not any(
        torch.equal(a, b) for a, b in zip(before, after, strict=True) if a.ndim == 4
    )
    assert all(parameter.isfinite().all() for parameter in after)
