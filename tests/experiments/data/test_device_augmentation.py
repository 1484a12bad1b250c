import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.data import crops
from experiments.data.cluttered_digits import load_cluttered_digits
from experiments.data.device_augmentation import crop, of_images
from experiments.data.splits import Augmentation

KEYS = jax.random.split(jax.random.key(0), 200)
HEIGHT, WIDTH, SIZE = 40, 60, 16


def crops_of(image, **changes) -> np.ndarray:
    augmentation = Augmentation(SIZE, 1.0, False, 1.0)._replace(**changes)
    image = jnp.asarray(image, jnp.float32)
    return np.asarray(
        jax.jit(jax.vmap(lambda key: crop(image, key, augmentation)))(KEYS)
    )


def coordinates() -> np.ndarray:
    """Each pixel's row and column in place of its colours."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    return np.stack([rows, columns, rows], axis=-1).astype(np.float32)


def test_a_whole_image_of_the_right_size_stays_as_it_is():
    image = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3))
    for found in crops_of(image)[:3]:
        np.testing.assert_allclose(found, image, atol=1e-4)


def test_half_of_the_images_are_mirrored():
    image = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3))
    found = crops_of(image, flip=True)
    mirrored = [np.allclose(each, image[:, ::-1], atol=1e-4) for each in found]
    whole = [np.allclose(each, image, atol=1e-4) for each in found]
    assert all(one != other for one, other in zip(mirrored, whole, strict=True))
    assert 70 < sum(mirrored) < 130


@pytest.mark.parametrize("min_area", [0.08, 0.5])
def test_crops_are_distributed_as_on_the_host(min_area):
    found = crops_of(coordinates(), min_area=min_area)
    # A crop's middle pixels tell its scale, whatever happens at its border.
    inner = slice(4, 12)
    heights = SIZE * np.diff(found[:, inner, 8, 0], axis=1).mean(axis=1)
    widths = SIZE * np.diff(found[:, 8, inner, 1], axis=1).mean(axis=1)
    tops = found[:, 8, 8, 0] + 0.5 - heights * 8.5 / SIZE
    # Those of the host, which are tried by themselves.
    random = np.random.default_rng(0)
    boxes = np.array(
        [crops._choose_box(HEIGHT, WIDTH, min_area, random) for _ in range(2_000)]
    )
    pairs = (
        (heights * widths / HEIGHT / WIDTH, boxes[:, 2] * boxes[:, 3] / HEIGHT / WIDTH),
        (widths / heights, boxes[:, 3] / boxes[:, 2]),
        (tops / HEIGHT, boxes[:, 0] / HEIGHT),
    )
    for one, other in pairs:
        levels = (0.1, 0.25, 0.5, 0.75, 0.9)
        expected = np.quantile(other, levels)
        np.testing.assert_allclose(np.quantile(one, levels), expected, atol=0.06)


def test_an_example_is_made_of_its_own_image():
    images = np.random.default_rng(0).integers(0, 256, (5, SIZE, SIZE, 3), np.uint8)
    examples = of_images(images, np.arange(5), Augmentation(SIZE, 1.0, False, 1.0))
    found = examples.make(jnp.asarray(images), 3, KEYS[0])
    np.testing.assert_allclose(found, images[3], atol=1e-4)


def test_digits_are_composed_as_on_the_host():
    """The same distribution: means and deviations of many images agree."""
    split, _ = load_cluttered_digits(Augmentation(64, 1.0, False, 1.0))
    examples = split.device_examples(lambda message: None)
    compose = jax.jit(jax.vmap(examples.make, (None, 0, 0)))
    digits = jnp.asarray(examples.arrays)
    numbers = np.arange(200)
    found = np.asarray(compose(digits, numbers, KEYS))
    assert found.shape == (200, 64, 64, 3)
    assert found.min() >= 0
    assert found.max() <= 255
    random = np.random.default_rng(0)
    host = np.stack([split.training_example(i, random).images for i in numbers]).astype(
        float
    )
    assert found.mean() == pytest.approx(host.mean(), rel=0.05)
    assert found.std() == pytest.approx(host.std(), rel=0.05)
    bright = [(each.max(axis=(1, 2)) > 120).mean() for each in (found, host)]
    assert bright[0] == pytest.approx(bright[1], rel=0.05)
    again = np.asarray(compose(digits, numbers, KEYS))
    np.testing.assert_array_equal(again, found)
