"""What is done to training images on the devices, where a data set lies there whole."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.data.splits import Augmentation

ATTEMPTS = 10  # at a crop that fits in the image
WIDEST = 4 / 3  # aspect ratio of a crop; 3 / 4 is the narrowest


class DeviceExamples(NamedTuple):
    """The training examples of a set that every device holds whole."""

    arrays: Any  # NumPy arrays, a tree of them
    labels: np.ndarray  # int32 (examples,)
    # From the arrays, an example's number and a random key to its augmented image,
    # float32 (size, size, 3), from 0 to 255.
    make: Callable[[Any, jax.Array, jax.Array], jax.Array]


def of_images(
    images: np.ndarray, labels: np.ndarray, augmentation: Augmentation
) -> DeviceExamples:
    """Images of one size, uint8 (examples, height, width, 3), cropped and mirrored."""

    def make(images: jax.Array, index: jax.Array, key: jax.Array) -> jax.Array:
        return crop(images[index].astype(jnp.float32), key, augmentation)

    return DeviceExamples(images, labels, make)


def crop(image: jax.Array, key: jax.Array, augmentation: Augmentation) -> jax.Array:
    """A random part of an image, as `experiments.data.crops.training_crop` takes it.

    Args:
      image: float32 (height, width, 3).
      key: of the draws.
      augmentation: image_size, min_area and flip are used.
    """
    box_key, flip_key = jax.random.split(key)
    size, (height, width) = augmentation.image_size, image.shape[:2]
    top, left, box_height, box_width = 0.0, 0.0, float(height), float(width)
    if augmentation.min_area < 1:
        top, left, box_height, box_width = _choose_box(
            box_key, height, width, augmentation.min_area
        )
    scale = jnp.array([size / box_height, size / box_width])
    part = jax.image.scale_and_translate(
        image,
        (size, size, image.shape[2]),
        (0, 1),
        scale,
        -jnp.array([top, left]) * scale,
        "linear",
    )
    if augmentation.flip:
        part = jnp.where(jax.random.bernoulli(flip_key), part[:, ::-1], part)
    return jnp.clip(part, 0, 255)


def _choose_box(key: jax.Array, height: int, width: int, min_area: float) -> Any:
    """The top, left, height and width of a crop; the first of some that fits."""
    draws = jax.random.uniform(key, (ATTEMPTS, 4))
    area = height * width * (min_area + (1 - min_area) * draws[:, 0])
    ratio = WIDEST ** (2 * draws[:, 1] - 1)
    heights, widths = jnp.sqrt(area / ratio), jnp.sqrt(area * ratio)
    fits = (heights <= height) & (widths <= width)
    # If none does, the largest centred part of an allowed aspect ratio.
    whole = (min(height, width * WIDEST), min(width, height * WIDEST))
    first, found = jnp.argmax(fits), jnp.any(fits)
    box_height = jnp.where(found, heights[first], whole[0])
    box_width = jnp.where(found, widths[first], whole[1])
    place = jnp.where(found, draws[first, 2:], 0.5)
    return (
        place[0] * (height - box_height),
        place[1] * (width - box_width),
        box_height,
        box_width,
    )


class Clutter(NamedTuple):
    """How `experiments.data.cluttered_digits` composes images."""

    image_size: int
    num_fragments: int
    fragment_size: int
    background: tuple[int, int]
    foreground: tuple[int, int]
    noise: int


def of_digits(
    digits: np.ndarray, labels: np.ndarray, clutter: Clutter
) -> DeviceExamples:
    """Digits, uint8 (examples, 28, 28), in images that are composed around them."""
    return DeviceExamples(digits, labels, functools.partial(compose, clutter))


def compose(
    clutter: Clutter, digits: jax.Array, index: jax.Array, key: jax.Array
) -> jax.Array:
    """Composes an image around a digit; place, colours and clutter are random."""
    size, fragment = clutter.image_size, clutter.fragment_size
    noise_key, level_key, *keys = jax.random.split(key, 3 + clutter.num_fragments)
    image = clutter.noise * jax.random.normal(noise_key, (size, size, 3))
    low, high = clutter.background
    image += jax.random.uniform(level_key, (3,), minval=low, maxval=high)
    for each in keys[:-1]:
        other_key, place_key, paint_key = jax.random.split(each, 3)
        other = jax.random.randint(other_key, (), 0, len(digits))
        corner = jax.random.randint(place_key, (2,), 0, 28 - fragment + 1)
        part = jax.lax.dynamic_slice(
            digits, (other, corner[0], corner[1]), (1, fragment, fragment)
        )
        image = _paint(image, part[0], paint_key, clutter)
    image = _paint(image, digits[index], keys[-1], clutter)
    return jnp.floor(jnp.clip(image, 0, 255))


def _paint(
    image: jax.Array, stroke: jax.Array, key: jax.Array, clutter: Clutter
) -> jax.Array:
    """Paints a stroke, (height, width), in a random colour at a random place."""
    colour_key, place_key = jax.random.split(key)
    low, high = clutter.foreground
    colour = jax.random.uniform(colour_key, (3,), minval=low, maxval=high)
    limits = jnp.array(image.shape[:2]) - jnp.array(stroke.shape) + 1
    top, left = jax.random.randint(place_key, (2,), 0, limits)
    start, shape = (top, left, 0), (*stroke.shape, 3)
    place = jax.lax.dynamic_slice(image, start, shape)
    place += (stroke[..., None].astype(jnp.float32) / 255) * (colour - place)
    return jax.lax.dynamic_update_slice(image, place, start)
