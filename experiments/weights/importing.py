"""A run before its first step, whose weights are published ones."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax

from experiments.checkpoints.load import adapt
from experiments.checkpoints.stored import stored_steps
from experiments.data.datasets import load_splits
from experiments.distributed import parallel
from experiments.distributed.processes import in_every_process, print_once
from experiments.inception.config import CONFIGURATION, CONVENTIONS
from experiments.inception.data import Data, LoadSplits
from experiments.inception.experiment import NETWORK, Experiment
from experiments.inception.network import Inception
from experiments.inception.training import check_config, described, measure
from experiments.running.record import CHECKPOINTS, Record
from experiments.running.run_folder import open_run
from experiments.running.workdir import WorkdirError
from experiments.weights.conversion import CLASSIFIER, convert, recognise
from experiments.weights.errors import WeightsError
from experiments.weights.files import read_weights
from experiments.weights.namings import Naming

# Those keys in which the network must be the published one.
PUBLISHED_KEYS = (
    *("batch_norm", "activation", "local_response_norm", "pool_projection"),
    *("separable_stem", "auxiliary_head", "epsilon", *CONVENTIONS),
)


def import_weights(
    file: Path,
    config: Mapping[str, Any],
    workdir: Path,
    data_dir: str | None,
    *,
    network: type[nn.Module] = Inception,
    load: LoadSplits = load_splits,
) -> None:
    """Writes the folder of a run that can be evaluated, and gone on with.

    Args:
      file: as `read_weights` takes it.
      config: keys as `experiments.inception.config.FIELDS` describes them.
      workdir: folder of the run, which must not have begun.
      data_dir: folder of prepared tensorflow-datasets, or None.
      network: the class of the network, with `Inception`'s attributes.
      load: opens the training and the test examples.

    Raises:
      WeightsError: the file cannot be read, or is of another network.
      ConfigError, DataError, WorkdirError: as their names say.
    """
    check_config(config)
    arrays = in_every_process(lambda: read_weights(file))
    check_variant(recognise(arrays), config)
    data = in_every_process(lambda: Data(config, data_dir, load))
    classes = data.train.num_classes
    experiment = Experiment(config, classes, network)
    fresh = jax.device_get(experiment.initial_state())
    converted = convert(arrays, fresh.variables, classes)
    anew = () if converted.num_classes == classes else (CLASSIFIER,)
    if anew:
        print_once(f"{file} has {converted.num_classes} classes, the data {classes}.")
    variables = adapt(converted.variables, fresh.variables, anew).variables
    states = {NETWORK: parallel.replicate(fresh._replace(**variables))}
    with open_run(workdir, described(config, data), CONFIGURATION):
        in_every_process(lambda: _check_new(workdir))
        record = Record(workdir, config, CONFIGURATION, ["metrics"])
        with record.opened(states, [0]):
            measured = measure(experiment, data, 0, states, {})
            record.report(0, measured)
    print_once(
        f"{workdir} holds {converted.naming.published}: top-1 {measured.score:.2f}% "
        f"of {config['dataset']} before any step."
    )


def _check_new(workdir: Path) -> None:
    if stored_steps(workdir / CHECKPOINTS):
        raise WorkdirError(
            f"{workdir} holds a run that has begun; choose another --workdir."
        )


def check_variant(naming: Naming, config: Mapping[str, Any]) -> None:
    """Checks that a configuration describes the network that was published.

    Raises:
      WeightsError: it describes another one.
    """
    published = CONFIGURATION.values(naming.variant)
    differences = [
        f"{key}={config[key]} (there {published[key]})"
        for key in PUBLISHED_KEYS
        if _plain(config[key]) != _plain(published[key])
    ]
    if differences:
        raise WeightsError(
            f"the file is {naming.published}, and --config.{', '.join(differences)} is "
            f"another network; give --config={naming.variant}."
        )


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value
