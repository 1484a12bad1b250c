"""A tiny network and data set in place of Inception's, so that tests take seconds."""

import functools
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import google_crc32c
import jax
import jax.numpy as jnp
import numpy as np

from experiments.data.crops import evaluation_crops
from experiments.data.device_augmentation import DeviceExamples, of_images
from experiments.data.splits import Augmentation, Example, Split, UndecodableError
from experiments.inception.config import get_config
from experiments.inception.data import Data, LoadSplits
from experiments.inception.experiment import Experiment
from experiments.inception.initialisation import Initialisation
from experiments.inception.layers import Convolution, local_response_norm
from experiments.inception.training import run

NUM_CLASSES = 6
NUM_TRAIN, NUM_TEST = 100, 44

# Evaluations, checkpoints and their common multiples all come within a few steps.
TINY = {
    "num_steps": 10,
    "batch_size": 16,
    "eval_every": 5,
    "checkpoint_every": 4,
    "eval_examples": 24,
    "eval_batch_size": 16,
    "population_batches": 3,
    "learning_rate": 0.01,
    "steps_per_decay": 18,
    "decay_factor": 0.99,
    "image_size": 32,
    "width": 1.0,
    "initialisation": "gaussian",
    "initial_std": 0.3,
    "decay": 0.9,
    "max_undecodable": 3,
}


def tiny_config(variant: str = "bn_x5", **changes: Any) -> dict[str, Any]:
    """A run of a second, of any variant."""
    return get_config(f"{variant},small").to_dict() | TINY | changes


class TinyInception(nn.Module):
    """One convolution in place of `Inception`'s 69; attributes and call as there."""

    num_classes: int = 1000
    norm: Any = None
    activation: str = "relu"
    dropout_rate: float = 0.0
    local_response_norm: bool = False
    width: float = 1.0
    pool_projection: int = 96
    separable_stem: bool = True
    padding: str = "tensorflow"
    input_shift: tuple[float, ...] = ()
    per_activation_rows: tuple[str, ...] = ()
    auxiliary_head: bool = False
    initialisation: Initialisation = Initialisation()
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> Any:
        norm = self.norm and functools.partial(self.norm, use_running_average=not train)
        x = Convolution(
            round(4 * self.width),
            3,
            2,
            norm=norm,
            activation=self.activation,
            per_activation=bool(self.per_activation_rows),
            kernel_init=self.initialisation.weights("conv1"),
            bias_init=self.initialisation.biases,
            dtype=self.dtype,
            name="conv1",
        )(images.astype(self.dtype))
        if self.local_response_norm:
            x = local_response_norm(x)
        x = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        auxiliary = None
        if self.auxiliary_head:
            auxiliary = nn.Dense(self.num_classes, name="auxiliary")(x)
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        logits = nn.Dense(
            self.num_classes,
            kernel_init=self.initialisation.weights("classifier"),
            name="classifier",
        )(x)
        return logits if auxiliary is None or not train else (logits, auxiliary)


class TinySplit:
    """Noisy images whose label shows in their brightness."""

    num_classes = NUM_CLASSES

    def __init__(
        self,
        num_examples: int,
        augmentation: Augmentation,
        seed: int = 0,
        broken: Collection[int] = (),
    ) -> None:
        size = augmentation.image_size
        random = np.random.default_rng(seed)
        self.labels = random.integers(0, NUM_CLASSES, num_examples)
        noise = random.integers(0, 50, (num_examples, size, size, 3))
        self.images = (noise + 30 * self.labels[:, None, None, None]).astype(np.uint8)
        self._augmentation = augmentation
        self._broken = broken

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shard_lengths(self) -> list[int]:
        return [40] * (len(self) // 40) + [len(self) % 40]

    @property
    def checksum(self) -> str:
        return f"{google_crc32c.value(self.images.tobytes()):08x}"

    @property
    def device_bytes(self) -> int:
        return self.images.nbytes

    def device_examples(self, report: Callable[[str], None]) -> DeviceExamples:
        return of_images(self.images, self.labels.astype(np.int32), self._augmentation)

    def training_example(self, index: int, random: np.random.Generator) -> Example:
        shift = random.integers(0, 50, dtype=np.uint8)
        return Example(self._decode(index) + shift, int(self.labels[index]))

    def evaluation_example(self, index: int, crops: int) -> Example:
        images = evaluation_crops(self._decode(index), self._augmentation, crops)
        return Example(images, int(self.labels[index]))

    def _decode(self, index: int) -> np.ndarray:
        if index in self._broken:
            raise UndecodableError(f"image {index} is broken")
        return self.images[index]


def load_tiny_splits(
    augmentation: Augmentation,
    broken_train: Collection[int] = (),
    broken_test: Collection[int] = (),
) -> tuple[Split, Split]:
    return (
        TinySplit(NUM_TRAIN, augmentation, 0, broken_train),
        TinySplit(NUM_TEST, augmentation, 1, broken_test),
    )


def load_tiny(**broken: Collection[int]) -> LoadSplits:
    """Opens tiny splits, whatever their name.

    Args:
      **broken: broken_train and broken_test: images that cannot be decoded.
    """

    def load(
        name: str, data_dir: str | None, augmentation: Augmentation
    ) -> tuple[Split, Split]:
        return load_tiny_splits(augmentation, **broken)

    return load


def tiny_data(config: Mapping[str, Any], **broken: Collection[int]) -> Data:
    return Data(config, None, load_tiny(**broken))


def tiny_experiment(config: Mapping[str, Any]) -> Experiment:
    return Experiment(config, NUM_CLASSES, TinyInception)


def run_tiny(
    config: Mapping[str, Any],
    workdir: Path,
    data_dir: str | None = None,
    **broken: Collection[int],
) -> None:
    run(config, workdir, data_dir, network=TinyInception, load=load_tiny(**broken))
