"""Networks of checkpoints, built again from the configuration that is stored there."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.checkpoints.stored import CheckpointError
from experiments.distributed import parallel
from experiments.inception.config import CONFIGURATION
from experiments.inception.construction import make_model
from experiments.inception.network import Inception
from experiments.mnist.network import MLP


class InputForm(NamedTuple):
    """How images become what a network takes: scale * pixel + offset.

    Attributes:
      shape: of one input.
      scale: see above; pixels go from 0 to 255.
      offset: see above.
      threshold: pixels above it become 1 and others 0, before they are scaled; None:
        they stay.
      crop_fraction: of the shorter side, which a centre crop sees; None: images are as
        large as inputs.
    """

    shape: tuple[int, ...]
    scale: float
    offset: float
    threshold: int | None = None
    crop_fraction: float | None = None

    def from_pixels(self, pixels: jax.Array) -> jax.Array:
        """Inputs, float32, from uint8 (examples, *shape)."""
        values = pixels if self.threshold is None else pixels > self.threshold
        return self.scale * values.astype(jnp.float32) + self.offset

    def cut(self, images: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
        """Brings images to the size of inputs: uint8 (examples, *shape).

        Raises:
          ValueError: an image has another type or shape than the network takes.
        """
        for number, image in enumerate(images):
            if image.dtype != np.uint8:
                raise ValueError(
                    f"image {number} is {image.dtype}: expected uint8, pixels from 0 "
                    "to 255."
                )
        if self.crop_fraction is None:
            return np.stack([self._flattened(image) for image in images])
        # Imported here: nothing else needs OpenCV.
        from experiments.data.crops import evaluation_crops
        from experiments.data.splits import Augmentation

        seen = Augmentation(self.shape[0], 1.0, False, self.crop_fraction)
        return np.concatenate(
            [evaluation_crops(self._coloured(image), seen, 1) for image in images]
        )

    def _flattened(self, image: np.ndarray) -> np.ndarray:
        if image.size != np.prod(self.shape):
            raise ValueError(
                f"an image has the shape {image.shape}: expected {self.shape[0]} "
                "pixels, as many as those of the training set have."
            )
        return image.reshape(self.shape)

    def _coloured(self, image: np.ndarray) -> np.ndarray:
        if image.ndim != 3 or image.shape[-1] not in (1, 3):
            raise ValueError(
                f"an image has the shape {image.shape}: expected (height, width, 3), "
                "or 1 for grey levels."
            )
        return image if image.shape[-1] == 3 else np.repeat(image, 3, axis=-1)


class Rebuilt(NamedTuple):
    """A network as it was configured, for one device."""

    network: nn.Module
    inputs: InputForm
    num_classes: int
    replicas: int | None  # trained side by side, along the first axis of every array


def rebuild(
    config: Mapping[str, Any],
    params: Mapping[str, Any],
    inception: type[nn.Module] = Inception,
) -> Rebuilt:
    """Builds the network that a checkpoint is of.

    Args:
      config: of the run, as the checkpoint has it.
      params: its parameters; names and shapes alone are looked at.
      inception: the class of section 4.2's network.

    Raises:
      CheckpointError: the configuration is of no experiment here.
    """
    for key, build in _BUILDERS.items():
        if key in config:
            return build(config, params, inception)
    raise CheckpointError(
        "the checkpoint has the configuration of no experiment here: export it without "
        "--fold, as arrays, or read them with load_variables."
    )


def _mlp(config: Mapping[str, Any], params: Mapping[str, Any], _: Any) -> Rebuilt:
    """Of section 4.1: several networks side by side."""
    replicas, inputs, _ = params["Dense_0"]["kernel"].shape
    classes = params[f"Dense_{len(config['hidden'])}"]["bias"].shape[-1]
    model = MLP(
        hidden=tuple(config["hidden"]),
        num_classes=classes,
        batch_norm="BatchNorm_0" in params,
        decay=config["decay"],
        epsilon=config["epsilon"],
    )
    form = (
        InputForm((inputs,), 1.0, 0.0, threshold=127)
        if config["binarise"]
        else InputForm((inputs,), 1 / 255, 0.0)
    )
    return Rebuilt(model, form, classes, replicas)


def _inception(
    config: Mapping[str, Any],
    params: Mapping[str, Any],
    inception: type[nn.Module],
) -> Rebuilt:
    """Of section 4.2."""
    classes = params["classifier"]["bias"].shape[-1]
    # Who shared moments while it was trained says nothing about inference.
    complete = CONFIGURATION.values() | dict(config) | {"moments": parallel.LOCAL}
    size = complete["image_size"]
    form = InputForm(
        (size, size, 3), 2 / 255, -1.0, crop_fraction=complete["crop_fraction"]
    )
    return Rebuilt(make_model(complete, classes, inception), form, classes, None)


# By a key that the configuration of this experiment alone has.
_BUILDERS: Mapping[str, Callable[..., Rebuilt]] = {
    "hidden": _mlp,
    "variant": _inception,
}
