"""Converted weights against the published networks themselves, built in torch."""

import functools

import jax
import numpy as np
import pytest

from experiments.inception.config import CONFIGURATION, get_config
from experiments.inception.construction import make_model
from experiments.weights.conversion import convert, recognise
from experiments.weights.errors import WeightsError
from experiments.weights.importing import check_variant
from experiments.weights.namings import NAMINGS

pytest.importorskip("torch", reason="torch comes with the extra `peers`")
from tests.experiments.weights import published

CLASSES, WIDTH = 7, 1 / 8
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), np.uint8)
PUBLISHED = {
    "bninception": (published.Cadene, CLASSES),
    "inception_v2": (published.Slim, CLASSES + 1),  # and the background
}
EVERY_NETWORK = pytest.mark.parametrize("variant", PUBLISHED)


@functools.cache
def made(variant):
    """The network of a variant, its fresh shapes, and the published one's results."""
    model = make_model(get_config(variant).to_dict() | {"width": WIDTH}, CLASSES)
    init = functools.partial(model.init, train=False)
    fresh = jax.eval_shape(init, jax.random.key(0), np.zeros((1, 224, 224, 3)))
    network, classes = PUBLISHED[variant]
    network = network(seed=1)
    logits = network(IMAGES, classes)
    arrays = {name: tensor.numpy() for name, tensor in network.state.items()}
    return model, fresh, arrays, logits[:, -CLASSES:]


@EVERY_NETWORK
def test_logits_are_those_of_the_published_network(variant):
    model, fresh, arrays, expected = made(variant)
    converted = convert(arrays, fresh, CLASSES)
    assert converted.num_classes == CLASSES
    assert jax.tree.structure(converted.variables) == jax.tree.structure(dict(fresh))
    inputs = 2 * (IMAGES.astype(np.float32) / 255) - 1
    apply = jax.jit(functools.partial(model.apply, train=False))
    logits = apply(converted.variables, inputs)
    assert np.ptp(expected) > 1
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


@EVERY_NETWORK
def test_every_array_is_needed(variant):
    _, fresh, arrays, _ = made(variant)
    for name in arrays:
        if f"{name.removesuffix('.bias')}_bn.bias" in arrays:
            continue  # a bias before the norm
        others = {other: array for other, array in arrays.items() if other != name}
        with pytest.raises(WeightsError, match="the file lacks") as error:
            convert(others, fresh, CLASSES)
        assert f"lacks {name}," in str(error.value)


@EVERY_NETWORK
def test_every_array_reaches_one_place(variant):
    _, fresh, arrays, _ = made(variant)
    numbers = {name: 2.0 * number + 3 for number, name in enumerate(arrays)}
    filled = {name: np.full(arrays[name].shape, n) for name, n in numbers.items()}
    leaves = jax.tree.leaves(convert(filled, fresh, CLASSES).variables)
    expected = dict(numbers)
    if variant == "bninception":
        expected["conv1_7x7_s2.weight"] *= 127.5
        for name in numbers:  # biases before norms are in the norms' means
            layer = name.removesuffix("_bn.running_mean")
            if layer != name:
                expected[name] -= expected.pop(f"{layer}.bias")
    else:  # without scales
        norms = [name for name in numbers if name.endswith("/beta")]
        expected |= {f"scale of {name}": 1.0 for name in norms}
    assert all(np.ptp(leaf) == 0 for leaf in leaves)
    assert sorted(leaf.flat[0] for leaf in leaves) == sorted(expected.values())


@EVERY_NETWORK
def test_arrays_without_a_place(variant):
    _, fresh, arrays, _ = made(variant)
    ignored = {
        "bninception": "conv1_7x7_s2_bn.num_batches_tracked",
        "inception_v2": "InceptionV2/Conv2d_2b_1x1/weights/Momentum",
    }
    convert(arrays | {ignored.pop(variant): np.zeros(3)}, fresh, CLASSES)
    for name in ignored.values():
        with pytest.raises(WeightsError, match=f"{name} of the file have no place"):
            convert(arrays | {name: np.zeros(3)}, fresh, CLASSES)


@EVERY_NETWORK
def test_arrays_of_other_shapes(variant):
    _, fresh, arrays, _ = made(variant)
    for name in list(arrays)[:6]:
        with pytest.raises(WeightsError, match=f"{name} has shape"):
            convert(arrays | {name: arrays[name][..., :1]}, fresh, CLASSES)


def test_statistics_may_have_an_axis_more():
    _, fresh, arrays, _ = made("bninception")
    wider = {
        name: array[None] if array.ndim == 1 and "_bn" in name else array
        for name, array in arrays.items()
    }
    jax.tree.map(
        np.testing.assert_array_equal,
        convert(wider, fresh, CLASSES).variables,
        convert(arrays, fresh, CLASSES).variables,
    )


def test_a_network_that_is_configured_otherwise():
    arrays, fresh = made("bninception")[2], made("inception_v2")[1]
    with pytest.raises(WeightsError, match="width or pool_projection are not"):
        convert(arrays, fresh, CLASSES)


@pytest.mark.parametrize(
    "names",
    [
        ("Mixed_5b.branch1x1.conv.weight", "Mixed_5b.branch1x1.bn.weight"),
        ("inception3a.branch1.conv.weight", "conv1.conv.weight"),
        ("InceptionV3/Conv2d_1a_3x3/weights", "InceptionV3/Logits/biases"),
        (),
    ],
)
def test_other_networks_are_named_as_such(names):
    with pytest.raises(WeightsError, match="are of another network; known are"):
        recognise({name: np.zeros(3) for name in names})


@pytest.mark.parametrize("naming", NAMINGS, ids=PUBLISHED)
def test_the_configuration_is_the_published_networks(naming):
    config = get_config(naming.variant).to_dict()
    check_variant(naming, config | {"width": 0.5, "dataset": "mine"})
    changes = {
        "pool_projection": 224 - config["pool_projection"],
        "epsilon": 0.5,
        "padding": "caffe" if config["padding"] == "tensorflow" else "tensorflow",
        "input_shift": (1.0, 2.0, 3.0),
    }
    for key, value in changes.items():
        with pytest.raises(
            WeightsError, match=f"{key}=.*give --config={naming.variant}"
        ):
            check_variant(naming, config | {key: value})
        CONFIGURATION.check(config | {key: value})
