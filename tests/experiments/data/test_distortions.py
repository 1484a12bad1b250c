import colorsys
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import PIL.ImageEnhance
import pytest

from experiments.data.distortions import STRENGTHS, adjust, distort

LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601


def make_images(
    batch: int = 1, low: float = 0, high: float = 1, channels: int = 3
) -> np.ndarray:
    random = np.random.default_rng(0)
    images = random.uniform(low, high, (batch, 12, 9, channels)).astype(np.float32)
    return np.broadcast_to(images, (batch, 12, 9, 3))


def make_keys(batch: int, seed: int = 0) -> jax.Array:
    return jax.random.split(jax.random.key(seed), batch)


def assert_close(found, expected, atol=1e-6):
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


def test_no_change():
    (image,) = make_images()
    assert_close(adjust(image, 0, 0, 0, 0), image)
    assert_close(adjust(image, 0, 0, 0, 1), image)  # one turn of hue


def test_brightness_is_added():
    image = np.array([[[0, 0.5, 1], [0.2, 0.9, 0.05]]], np.float32)
    brighter = [[[0.2, 0.7, 1], [0.4, 1, 0.25]]]
    assert_close(adjust(image, 0.2, 0, 0, 0), brighter)
    assert_close(adjust(image, -0.1, 0, 0, 0), [[[0, 0.4, 0.9], [0.1, 0.8, 0]]])


@pytest.mark.parametrize(
    ("name", "enhancer"),
    [("contrast", PIL.ImageEnhance.Contrast), ("saturation", PIL.ImageEnhance.Color)],
)
@pytest.mark.parametrize("change", [-1, -0.5, 0.5, 1])
def test_contrast_and_saturation_are_as_in_pillow(name, enhancer, change):
    pixels = (make_images() * 255).round().astype(np.uint8)[0]
    expected = np.asarray(enhancer(PIL.Image.fromarray(pixels)).enhance(1 + change))
    changes = {"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0}
    found = adjust(jnp.float32(pixels) / 255, **(changes | {name: change}))
    # Pillow rounds the luma, which is then multiplied by the change, and the result.
    assert_close(found * 255, expected, 1.5)


@pytest.mark.parametrize("turns", [-0.2, 0.1, 0.25, 0.5])
def test_hue_turns_the_chroma_of_yiq(turns):
    (image,) = make_images(low=0.3, high=0.7)
    expected = np.empty_like(image)
    for place in np.ndindex(image.shape[:2]):
        luma, *chroma = colorsys.rgb_to_yiq(*image[place])
        turned = complex(*chroma) * np.exp(2j * np.pi * turns)
        expected[place] = colorsys.yiq_to_rgb(luma, turned.real, turned.imag)
    # Python's constants differ from ours in the third digit.
    assert_close(adjust(image, 0, 0, 0, turns), expected, 0.01)


def test_greys_stay_grey():
    (image,) = make_images(channels=1)
    assert_close(adjust(image, 0, 0, 0.5, 0.2), image)
    adjusted = adjust(image, 0.1, -0.3, 0.5, 0.2)
    assert_close(adjusted, adjusted[..., :1] * np.ones(3))


def test_saturation_and_hue_keep_luma():
    (image,) = make_images(low=0.4, high=0.6)
    adjusted = np.asarray(adjust(image, 0, 0, 0.3, -0.15))
    assert np.abs(adjusted - image).max() > 0.1
    assert_close(adjusted @ LUMA, image @ LUMA)


def test_contrast_keeps_the_mean_luma():
    (image,) = make_images(low=0.3, high=0.7)
    adjusted = np.asarray(adjust(image, 0, 0.5, 0, 0))
    assert_close((adjusted @ LUMA).mean(), (image @ LUMA).mean())
    assert_close(adjusted.std(), 1.5 * image.std())


def test_all_changes_are_the_single_ones_in_any_order():
    (image,) = make_images(low=0.4, high=0.6)
    changes = np.diag([0.1, 0.3, -0.4, 0.2]).astype(np.float32)
    expected = adjust(image, *changes.sum(0))
    assert 0 < expected.min() < expected.max() < 1  # nothing was clipped
    for order in itertools.permutations(changes):
        assert_close(
            functools.reduce(lambda x, one: adjust(x, *one), order, image), expected
        )


def measure_changes(images: np.ndarray, distorted: np.ndarray) -> dict[str, np.ndarray]:
    """Finds by how much each image's brightness, contrast and colours were changed."""
    axes = np.array([[0.596, -0.274, -0.322], [0.211, -0.523, 0.312]]).T

    def chroma(images):
        return (images @ axes).reshape(len(images), -1, 2) @ [1, 1j]

    before, after = images @ LUMA, distorted @ LUMA
    contrast = after.std((1, 2)) / before.std((1, 2))
    ratios = np.mean(chroma(distorted) / chroma(images), axis=1)
    return {
        "brightness": (after - before).mean((1, 2)),
        "contrast": contrast - 1,
        "saturation": np.abs(ratios) / contrast - 1,
        "hue": np.angle(ratios) / (2 * np.pi),
    }


@pytest.mark.parametrize("strength", ["weak", "strong"])
def test_changes_are_uniform_within_their_limits(strength):
    images = make_images(1000, low=0.45, high=0.55)  # so that nothing is clipped
    distorted = distort(make_keys(1000), images, strength)
    assert 0 < distorted.min() < distorted.max() < 1
    changes = measure_changes(images, np.asarray(distorted))
    for name, limit in STRENGTHS[strength]._asdict().items():
        quantiles = np.quantile(changes[name], [0, 0.25, 0.5, 0.75, 1])
        expected = limit * np.array([-1, -0.5, 0, 0.5, 1])
        assert_close(quantiles, expected, 0.15 * limit + 1e-5)
        assert np.abs(changes[name]).max() <= limit + 1e-5
    correlations = np.corrcoef([x for x in changes.values() if x.std() > 1e-4])
    assert_close(correlations, np.eye(len(correlations)), 0.15)


def test_strengths_are_ordered():
    for none, weak, strong in zip(*STRENGTHS.values(), strict=True):
        assert none == 0 <= weak < strong
    images = make_images(64)
    change = {
        strength: np.abs(distort(make_keys(64), images, strength) - images).mean()
        for strength in STRENGTHS
    }
    assert change["none"] == 0 < 2 * change["weak"] < change["strong"]


def test_none_does_nothing():
    images = jnp.asarray(make_images(4)) * 3 - 1  # would be clipped
    assert distort(make_keys(4), images, "none") is images


@pytest.mark.parametrize("strength", ["weak", "strong"])
def test_an_image_does_not_depend_on_its_batch(strength):
    images, keys = make_images(6), make_keys(6)
    together = distort(keys, images, strength)
    parts = [
        distort(keys[i:j], images[i:j], strength) for i, j in ((0, 1), (1, 4), (4, 6))
    ]
    assert_close(together, jnp.concatenate(parts))
    # Another key, another change.
    other = distort(make_keys(6, seed=1), images, strength)
    assert (np.abs(other - together).max((1, 2, 3)) > 0.01).all()


def test_images_of_one_key_change_alike_and_others_do_not():
    keys = make_keys(2)
    images = np.full((3, 4, 4, 3), (0.3, 0.5, 0.6), np.float32)
    one, same, other = distort(keys[jnp.array([0, 0, 1])], images, "strong")
    assert_close(one, same)
    assert np.abs(one - other).max() > 0.01


def test_same_numbers_over_eight_devices():
    images, keys = make_images(16), make_keys(16)
    whole = jax.jit(distort, static_argnums=2)(keys, images, "strong")
    mapped = jax.pmap(lambda key, images: distort(key, images, "strong"))
    split = mapped(keys.reshape(8, 2), images.reshape(8, 2, *images.shape[1:]))
    assert_close(split.reshape(whole.shape), whole)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("strength", STRENGTHS)
def test_keeps_dtype_shape_and_range(strength, dtype):
    images = jnp.asarray(make_images(32), dtype)
    distorted = distort(make_keys(32), images, strength)
    assert distorted.dtype == dtype
    assert distorted.shape == images.shape
    assert distorted.min() >= 0
    assert distorted.max() <= 1


def test_unknown_strength():
    with pytest.raises(
        ValueError, match=r"'mild': expected one of none, weak, strong;"
    ):
        distort(make_keys(1), make_images(), "mild")
