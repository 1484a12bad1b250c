import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.mnist.network import MLP

HIDDEN_WEIGHTS = 784 * 100 + 100 * 100 + 100 * 100


def init(model):
    return model.init(jax.random.key(0), jnp.zeros((1, 784)), train=True)


def count(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def random_variables(model, num_inputs):
    """Float64 arrays in the place of all variables, so that no default hides."""
    random = np.random.default_rng(0)
    variables = model.init(jax.random.key(0), jnp.zeros((1, num_inputs)), train=True)
    return jax.tree.map(lambda leaf: random.uniform(0.2, 1, leaf.shape), variables)


def test_baseline_has_the_papers_parameters():
    variables = init(MLP(batch_norm=False))
    assert variables.keys() == {"params"}
    shapes = jax.tree.map(jnp.shape, variables["params"])
    assert shapes == {
        "Dense_0": {"kernel": (784, 100), "bias": (100,)},
        "Dense_1": {"kernel": (100, 100), "bias": (100,)},
        "Dense_2": {"kernel": (100, 100), "bias": (100,)},
        "Dense_3": {"kernel": (100, 10), "bias": (10,)},
    }
    assert count(variables) == HIDDEN_WEIGHTS + 300 + 1000 + 10


def test_batch_norm_takes_the_place_of_the_bias():
    variables = init(MLP(batch_norm=True))
    shapes = jax.tree.map(jnp.shape, variables["params"])
    norm = {"scale": (100,), "bias": (100,)}
    assert shapes == {
        "Dense_0": {"kernel": (784, 100)},
        "Dense_1": {"kernel": (100, 100)},
        "Dense_2": {"kernel": (100, 100)},
        "Dense_3": {"kernel": (100, 10), "bias": (10,)},
        "BatchNorm_0": norm,
        "BatchNorm_1": norm,
        "BatchNorm_2": norm,
    }
    assert count(variables["params"]) == HIDDEN_WEIGHTS + 600 + 1000 + 10
    assert count(variables["batch_stats"]) == 600


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("std", [0.1, 0.01])
def test_initial_values(batch_norm, std):
    params = init(MLP(batch_norm=batch_norm, initial_std=std))["params"]
    for layer in range(4):
        kernel = np.asarray(params[f"Dense_{layer}"]["kernel"])
        assert kernel.std() == pytest.approx(std, rel=0.06)
        assert abs(kernel.mean()) < 4 * std / np.sqrt(kernel.size)
        # Gaussian, not cut off: the share beyond two deviations.
        assert np.mean(np.abs(kernel) > 2 * std) == pytest.approx(0.0455, abs=0.015)
        if kernel.size > 5_000:
            assert np.abs(kernel).max() > 3.5 * std
    for layer, leaves in params.items():
        for name, values in leaves.items():
            if name != "kernel":
                assert (values == (name == "scale")).all(), layer


def test_both_networks_start_from_the_same_kernels():
    without = init(MLP(batch_norm=False))["params"]
    with_norm = init(MLP(batch_norm=True))["params"]
    for layer in range(4):
        np.testing.assert_array_equal(
            without[f"Dense_{layer}"]["kernel"], with_norm[f"Dense_{layer}"]["kernel"]
        )


def test_baseline_computes_sigmoid_layers():
    model = MLP(hidden=(5, 4), num_classes=3, batch_norm=False)
    params = random_variables(model, 6)["params"]
    x = np.random.default_rng(1).normal(size=(7, 6))
    expected = x
    for layer in range(2):
        dense = params[f"Dense_{layer}"]
        expected = sigmoid(expected @ dense["kernel"] + dense["bias"])
    expected = expected @ params["Dense_2"]["kernel"] + params["Dense_2"]["bias"]
    with jax.enable_x64(True):
        for train in True, False:
            found = model.apply({"params": params}, x, train=train)
            np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("train", [True, False])
def test_batch_norm_sits_between_the_product_and_the_sigmoid(train):
    model = MLP(hidden=(5, 4), num_classes=3, epsilon=0.03, decay=0.7)
    variables = random_variables(model, 6)
    params, stats = variables["params"], variables["batch_stats"]
    x = np.random.default_rng(1).normal(size=(7, 6))
    with jax.enable_x64(True):
        found, updated = model.apply(
            variables, x, train=train, mutable=["batch_stats", "intermediates"]
        )
    expected = x
    for layer in range(2):
        expected = expected @ params[f"Dense_{layer}"]["kernel"]
        norm, old = params[f"BatchNorm_{layer}"], stats[f"BatchNorm_{layer}"]
        mean, var = old["mean"], old["var"]
        new = updated["batch_stats"][f"BatchNorm_{layer}"]
        if train:
            mean, var = expected.mean(axis=0), expected.var(axis=0)
            np.testing.assert_allclose(new["mean"], 0.7 * old["mean"] + 0.3 * mean)
            unbiased = expected.var(axis=0, ddof=1)
            np.testing.assert_allclose(new["var"], 0.7 * old["var"] + 0.3 * unbiased)
        else:
            np.testing.assert_array_equal(new["mean"], old["mean"])
            np.testing.assert_array_equal(new["var"], old["var"])
        expected = (expected - mean) / np.sqrt(var + 0.03)
        expected = expected * norm["scale"] + norm["bias"]
        if layer == 1:
            (probed,) = updated["intermediates"]["sigmoid_input"]
            np.testing.assert_allclose(probed, expected, rtol=1e-9)
        expected = sigmoid(expected)
    expected = expected @ params["Dense_2"]["kernel"] + params["Dense_2"]["bias"]
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_baseline_shows_its_last_sigmoid_input():
    model = MLP(hidden=(5, 4), num_classes=3, batch_norm=False)
    params = random_variables(model, 6)["params"]
    x = np.random.default_rng(1).normal(size=(7, 6))
    with jax.enable_x64(True):
        _, seen = model.apply(
            {"params": params}, x, train=True, mutable=["intermediates"]
        )
    hidden = sigmoid(x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"])
    expected = hidden @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"]
    (probed,) = seen["intermediates"]["sigmoid_input"]
    np.testing.assert_allclose(probed, expected, rtol=1e-12)
