import collections
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.distributed import parallel
from experiments.inception import layers
from experiments.inception.config import FIELDS, get_config
from experiments.inception.construction import make_model
from experiments.inception.initialisation import GOOGLENET, Initialisation
from experiments.inception.layers import Convolution
from tests.experiments.inception.tiny_inception import tiny_config


def test_the_model_is_the_configured_one():
    config = get_config("ensemble_6,small").to_dict()
    model = make_model(config | {"dtype": "bfloat16", "width": 0.5}, 7)
    assert type(model).__name__ == "Inception"
    found = {key: getattr(model, key) for key in ("num_classes", "width", "dtype")}
    assert found == {"num_classes": 7, "width": 0.5, "dtype": jnp.bfloat16}
    assert model.dropout_rate == 0.1
    assert model.per_activation_rows == ("5a", "5b")
    assert model.separable_stem
    assert not model.local_response_norm
    assert not model.auxiliary_head
    norm = model.norm()
    assert (norm.momentum, norm.epsilon) == (config["decay"], 1e-3)
    assert norm.axis_name == parallel.DEVICE_AXIS
    baseline = make_model(get_config("inception_sigmoid").to_dict(), 1000)
    assert baseline.norm is None
    assert baseline.activation == "sigmoid"
    assert baseline.local_response_norm
    assert baseline.dropout_rate == 0.4


def test_equal_configurations_share_a_model():
    config = get_config("ensemble_4").to_dict()
    model = make_model(config, 10)
    other = {"seed": 9, "learning_rate": 3.0, "num_steps": 7, "l2_weight": 0.5}
    # As a configuration that was read from JSON has it.
    assert make_model(config | other | {"per_activation_rows": ["5b"]}, 10) is model
    assert make_model(config, 11) is not model


class Recorder(Initialisation):
    """Notes which layers ask for initial values, and for which shapes."""

    asked: ClassVar[list[tuple[str, bool, tuple[int, ...]]]] = []

    def weights(self, layer, *, separable=False):
        def init(key, shape, dtype=jnp.float32):
            self.asked.append((layer, separable, shape))
            return super(Recorder, self).weights(layer)(key, shape, dtype)

        return init


def test_every_layer_starts_as_its_name_says(monkeypatch):
    """So that 1x1, 3x3 and 7x7 kernels and classifiers have their own deviations."""
    model = make_model(get_config("inception").to_dict() | {"auxiliary_head": True}, 10)
    asked = []
    monkeypatch.setattr(Recorder, "asked", asked)
    # A matrix does not show the kernel's sides.
    monkeypatch.setattr(layers, "drawn_as_matrix", lambda initialise: initialise)
    model = model.clone(initialisation=Recorder("googlenet"))
    jax.eval_shape(
        functools.partial(model.init, train=True),
        {"params": jax.random.key(0), "dropout": jax.random.key(0)},
        jnp.zeros((1, 224, 224, 3)),
    )
    names = {layer for layer, *_ in asked}
    assert names == GOOGLENET.keys() == STANDARD_DEVIATIONS.keys()
    sizes = {"conv1": {1, 7}, "conv2": {3}, "conv3x3": {3}}
    sizes |= {"double3x3_1": {3}, "double3x3_2": {3}, "classifier": {768, 1024}}
    for name in names:
        found = {shape[0] for layer, _, shape in asked if layer == name}
        assert found == sizes.get(name, {1}), name
    assert {layer for layer, separable, _ in asked if separable} == {"conv1"}
    # The table's ten rows, of which two have neither 1x1 nor projection.
    counts = collections.Counter(layer for layer, *_ in asked)
    assert counts["conv3x3"] == counts["reduce_double3x3"] == 10
    assert counts["conv1x1"] == counts["pool_projection"] == 8
    assert counts["classifier"] == 2


# By hand, of width 1.
STANDARD_DEVIATIONS = {
    "conv1": 0.1,
    "conv2_reduce": 0.1,
    "conv2": 0.03,
    "conv1x1": 0.03,
    "reduce3x3": 0.09,
    "conv3x3": 0.03,
    "reduce_double3x3": 0.09,
    "double3x3_1": 0.03,
    "double3x3_2": 0.03,
    "pool_projection": 0.1,
    "reduce": 0.08,
    "dense": 0.02,
    "classifier": 1 / 1024,
}
WIDTH, SCALE, STD = 1 / 4, 3.0, 0.17


def expected_deviation(kind: str, layer: str) -> float:
    """By width but for the layer that sees colours; by scale but for classifiers."""
    scale = 1 if layer == "classifier" else SCALE
    if kind == "googlenet":
        width = 1 if layer == "conv1" else WIDTH
        return scale * STANDARD_DEVIATIONS[layer] / np.sqrt(width)
    return scale * {"gaussian": STD, "he": np.sqrt(2 / 2_000)}[kind]


@pytest.mark.parametrize("layer", STANDARD_DEVIATIONS)
@pytest.mark.parametrize("kind", FIELDS["initialisation"].choices)
def test_initial_values_of_a_layer(kind, layer):
    config = tiny_config(
        initialisation=kind, initial_std=STD, initial_scale=SCALE, width=WIDTH
    )
    found = make_model(config, 10).initialisation
    weights = found.weights(layer)(jax.random.key(0), (2_000, 50), jnp.float32)
    deviation = expected_deviation(kind, layer)
    assert weights.std() == pytest.approx(deviation, rel=0.02)
    assert abs(weights.mean()) < 0.02 * deviation
    # Not truncated.
    assert abs(weights).max() > 3.5 * deviation
    biases = found.biases(jax.random.key(0), (3,), jnp.float32)
    np.testing.assert_array_equal(biases, np.float32(0.2 * (kind == "googlenet")))


def test_a_separable_convolution_starts_as_the_one_that_it_amounts_to():
    init = Initialisation("googlenet").weights("conv1", separable=True)
    depthwise = init(jax.random.key(0), (7, 7, 3, 8))
    pointwise = init(jax.random.key(1), (3, 8, 640))
    kernel = np.einsum("hwim,imo->hwio", depthwise, pointwise)
    assert kernel.std() == pytest.approx(0.1, rel=0.1)


def test_biases_of_a_convolution():
    layer = Convolution(4, 3, bias_init=Initialisation("googlenet").biases)
    params = layer.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    np.testing.assert_array_equal(params["conv"]["bias"], np.float32(0.2))
