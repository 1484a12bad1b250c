"""The images that the parts train on and measure with."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from experiments.configuration.fields import ConfigError, as_tuple
from experiments.data.cluttered_digits import ClutteredDigits
from experiments.data.image_set import ImageSet, load_image_set, to_inputs
from experiments.data.splits import Augmentation
from experiments.why.training import Examples

INCEPTION_IMAGE_SIZE = 32
NUM_DIGITS = 10  # classes of the composed images


class Data(NamedTuple):
    """Vectors of pixels that are 0 or 1, as in section 4.1; uint8."""

    training: Examples
    test: Examples
    num_classes: int
    checksum: str

    @property
    def num_inputs(self) -> int:
        """Pixels of an image."""
        return int(self.training.images.shape[1])


def load(config: Mapping[str, Any], data_dir: str | None) -> Data:
    """Loads the data set that a configuration names.

    Raises:
      DataError: it cannot be read.
      ConfigError: it has fewer examples than the configuration asks for.
    """
    data = from_images(load_image_set(config["dataset"], data_dir))
    for key in ("batch_size", "probe_examples", "dropout_examples"):
        if config[key] > len(data.training.labels):
            raise ConfigError(
                f"--config.{key}={config[key]}: expected at most the "
                f"{len(data.training.labels)} training examples."
            )
    return data


def from_images(images: ImageSet) -> Data:
    """Makes the inputs of a fully connected network of images."""

    def make(pixels: np.ndarray, labels: np.ndarray) -> Examples:
        return Examples(jnp.asarray(to_inputs(pixels, True)), jnp.asarray(labels))

    return Data(
        make(images.train_images, images.train_labels),
        make(images.test_images, images.test_labels),
        images.num_classes,
        images.checksum,
    )


def first(examples: Examples, count: int) -> Examples:
    """The first examples."""
    return Examples(*(array[:count] for array in examples))


def compose_digits(config: Mapping[str, Any]) -> Examples:
    """Colour images of a digit among clutter, for Inception; from -1 to 1."""
    images = load_image_set("mnist")
    digits = ClutteredDigits(
        images.train_images[..., 0],
        images.train_labels,
        Augmentation(INCEPTION_IMAGE_SIZE, min_area=1.0, flip=False, crop_fraction=1.0),
    )
    composed = [
        digits.training_example(index, np.random.default_rng([0, index]))
        for index in range(config["inception_examples"])
    ]
    pixels = np.stack([example.images for example in composed])
    labels = np.array([example.label for example in composed], np.int32)
    return Examples(jnp.asarray(pixels / np.float32(127.5) - 1), jnp.asarray(labels))


def check(config: Mapping[str, Any]) -> None:
    """Checks that numbers of examples fit one another.

    Raises:
      ConfigError: they do not.
    """
    for batch, examples in (
        ("batch_size", "dropout_examples"),
        ("inception_batch_size", "inception_examples"),
    ):
        if config[batch] > config[examples]:
            raise ConfigError(
                f"--config.{batch}={config[batch]}: expected at most "
                f"{examples}, which is {config[examples]}."
            )
    if 1 in as_tuple(config["dropouts"]):
        raise ConfigError("--config.dropouts: expected shares below 1; 1 leaves none.")
