"""A run's network, ready to be used: one call, and no data set or optimiser.

from experiments.checkpoints.model import load_model
model = load_model("runs/mnist", network="batch_norm")
probabilities = model.predict(images)
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from experiments.checkpoints.folders import NEWEST, choose_checkpoint
from experiments.checkpoints.load import load_variables
from experiments.checkpoints.networks import InputForm, Rebuilt, rebuild
from experiments.checkpoints.stored import (
    CheckpointError,
    damage_named,
    read_metadata,
)
from experiments.data.class_names import class_names
from experiments.inception.network import Inception

# Of the runs' folders of checkpoints, the first that there is: with Algorithm 2's
# statistics, or else with moving averages.
PREFERRED = ("population", "checkpoints")


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A trained network.

    Attributes:
      network: `network.apply(variables, inputs, train=False)` gives logits.
      variables: `params` and `batch_stats`, nested dicts of NumPy arrays.
      inputs: how images become inputs.
      class_names: in the order of the logits.
    """

    network: nn.Module
    variables: Mapping[str, Any]
    inputs: InputForm
    class_names: tuple[str, ...]

    def predict(self, images: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
        """Class probabilities, float32 (examples, classes).

        Args:
          images: uint8, (height, width, channels) each, pixels from 0 to 255; for a
            network of section 4.2 of any sizes, grey or in colour.

        Raises:
          ValueError: an image has another type or shape.
        """
        pixels = self.inputs.cut(images)
        return np.asarray(self._probabilities(self.variables, pixels))

    @functools.cached_property
    def _probabilities(self) -> Any:
        return jax.jit(
            functools.partial(probabilities, self.network.apply, self.inputs)
        )


def probabilities(
    apply: Any, inputs: InputForm, variables: Mapping[str, Any], pixels: jax.Array
) -> jax.Array:
    """Class probabilities from uint8 (examples, *inputs.shape)."""
    logits = apply(variables, inputs.from_pixels(pixels), train=False)
    return nn.softmax(logits)


def load_model(
    folder: str | Path,
    *,
    step: int | str = NEWEST,
    network: str | None = None,
    replica: int = 0,
    data_dir: str | None = None,
    inception: type[nn.Module] = Inception,
) -> LoadedModel:
    """Loads the network of a run, as it is used.

    Args:
      folder: a run's workdir (Algorithm 2's statistics where it has them), a folder of
        checkpoints in it, or one of them.
      step: as for `load_variables`.
      network: as for `load_variables`.
      replica: which one, of networks that were trained side by side.
      data_dir: folder of prepared data sets, for the names of classes; where the run's
        set is not there, classes are called by their numbers.
      inception: the class of section 4.2's network.

    Raises:
      CheckpointError: there is no such checkpoint, network or replica, it is damaged,
        or it is of no experiment here.
    """
    checkpoint = find(Path(folder), step)
    with damage_named(checkpoint):
        config = read_metadata(checkpoint).config
    variables = load_variables(checkpoint, network=network)
    rebuilt = rebuild(config, variables["params"], inception)
    return LoadedModel(
        rebuilt.network,
        one_replica(rebuilt, variables, replica),
        rebuilt.inputs,
        class_names(config["dataset"], rebuilt.num_classes, data_dir),
    )


def find(folder: Path, step: int | str = NEWEST) -> Path:
    """A checkpoint of a workdir, of the first of `PREFERRED` that it has."""
    below = [folder / name for name in PREFERRED if (folder / name).is_dir()]
    return choose_checkpoint(below[0] if below else folder, step)


def one_replica(
    rebuilt: Rebuilt, variables: Mapping[str, Any], replica: int
) -> dict[str, Any]:
    """Variables of one of the networks that were trained side by side.

    Raises:
      CheckpointError: there is no such replica.
    """
    count = rebuilt.replicas or 1
    if not 0 <= replica < count:
        raise CheckpointError(
            f"there is no replica {replica}: expected 0 to {count - 1}, in the order "
            "of learning rates, initial deviations and seeds."
        )
    if rebuilt.replicas is None:
        return dict(variables)
    return jax.tree.map(lambda leaf: leaf[replica], dict(variables))
