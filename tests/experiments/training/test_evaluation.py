import functools

import jax
import numpy as np
import pytest

from experiments.distributed import parallel
from experiments.training import evaluation
from tests.experiments.helpers import make_image_set, make_models, make_states

DATA = make_image_set(num_train=64, num_test=101)
TRAIN = DATA.train_images.reshape(64, 20)
TEST = DATA.test_images.reshape(101, 20)
MODELS = make_models(epsilon=0.01)
SCALE = 1 / 255


@pytest.fixture(scope="module")
def states():
    return make_states(MODELS, 20)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def layer_inputs(model, state, replica, inputs, use_batch):
    """What each sigmoid receives, and the logits, for one replica, in float64."""
    params, stats = jax.tree.map(
        lambda leaf: np.array(leaf[replica], np.float64),
        (state.params, state.batch_stats),
    )
    x, products, sigmoid_inputs = inputs * SCALE, [], []
    for layer in range(len(model.hidden)):
        dense = params[f"Dense_{layer}"]
        z = x @ dense["kernel"] + dense.get("bias", 0)
        products.append(z)
        if model.batch_norm:
            norm, old = params[f"BatchNorm_{layer}"], stats[f"BatchNorm_{layer}"]
            mean, var = old["mean"], old["var"]
            if use_batch:
                mean, var = z.mean(axis=0), z.var(axis=0)
            z = (z - mean) / np.sqrt(var + model.epsilon)
            z = z * norm["scale"] + norm["bias"]
        sigmoid_inputs.append(z)
        x = sigmoid(z)
    last = params[f"Dense_{len(model.hidden)}"]
    return products, sigmoid_inputs, x @ last["kernel"] + last["bias"]


def count(states, images, labels):
    padded = evaluation.pad_and_mask(images, labels, jax.local_device_count())
    mapped = parallel.map_over_devices(
        functools.partial(evaluation.count_correct, MODELS, SCALE),
        in_axes=(None, 0, 0, 0),
    )
    return mapped(states, *(parallel.shard(array, axis=0) for array in padded))


@pytest.mark.parametrize(("size", "padded"), [(101, 104), (96, 96), (1, 8)])
def test_pad_and_mask(size, padded):
    images, labels, mask = evaluation.pad_and_mask(
        TEST[:size], DATA.test_labels[:size], 8
    )
    assert images.shape == (padded, 20)
    assert images.dtype == np.uint8
    assert labels.shape == mask.shape == (padded,)
    np.testing.assert_array_equal(images[:size], TEST[:size])
    np.testing.assert_array_equal(labels[:size], DATA.test_labels[:size])
    assert mask.tolist() == [True] * size + [False] * (padded - size)


def test_count_correct_is_inference_by_hand(states):
    found = count(states, TEST, DATA.test_labels)
    for name, model in MODELS.items():
        assert found[name].dtype == np.int32
        for replica in range(2):
            *_, logits = layer_inputs(model, states[name], replica, TEST, False)
            expected = np.sum(logits.argmax(axis=1) == DATA.test_labels)
            assert found[name][replica] == expected
            assert 0 < expected < 101


def test_padding_is_not_counted(states):
    """Networks that always answer 0 are right about padding, whose label is 0."""
    always_zero = {}
    for name, state in states.items():
        last = state.params["Dense_2"]
        bias = last["bias"].at[:, 0].set(1_000)
        params = state.params | {"Dense_2": last | {"bias": bias}}
        always_zero[name] = state._replace(params=params)
    found = count(always_zero, TEST, DATA.test_labels)
    for name in MODELS:
        assert found[name].tolist() == [np.sum(DATA.test_labels == 0)] * 2


def test_population_statistics_average_those_of_batches(states):
    random = np.random.default_rng(2)
    indices = random.integers(0, 64, (5, 2, 16), dtype=np.int32)
    mapped = parallel.map_over_devices(
        functools.partial(evaluation.population_statistics, MODELS, SCALE),
        in_axes=(None, None, None, 0),
    )
    data = parallel.replicate((TRAIN, DATA.train_labels))
    found = mapped(states, *data, parallel.shard(indices, axis=2))
    assert found["baseline"] == {}
    assert found["batch_norm"].keys() == {"BatchNorm_0", "BatchNorm_1"}
    model, state = MODELS["batch_norm"], states["batch_norm"]
    for replica in range(2):
        batches = [
            layer_inputs(model, state, replica, TRAIN[index], True)[0]
            for index in indices[:, replica]
        ]
        for layer in range(2):
            values = np.stack([products[layer] for products in batches])
            mean, var = (
                found["batch_norm"][f"BatchNorm_{layer}"][name][replica]
                for name in ("mean", "var")
            )
            np.testing.assert_allclose(mean, values.mean(axis=1).mean(0), rtol=1e-5)
            unbiased = values.var(axis=1, ddof=1).mean(0)
            np.testing.assert_allclose(var, unbiased, rtol=1e-4)


def test_sigmoid_inputs_are_those_of_training(states):
    found = evaluation.sigmoid_inputs(MODELS, SCALE, states, TEST)
    for name, model in MODELS.items():
        assert found[name].shape == (2, 101, 6)
        for replica in range(2):
            _, expected, _ = layer_inputs(model, states[name], replica, TEST, True)
            np.testing.assert_allclose(
                found[name][replica], expected[-1], rtol=1e-4, atol=1e-4
            )
