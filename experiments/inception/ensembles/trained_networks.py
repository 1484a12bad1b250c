"""Networks that runs of the Inception experiment have trained, read for evaluation."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from experiments.checkpoints.save import restore_newest
from experiments.configuration.fields import ConfigError, Role
from experiments.data.datasets import load_splits
from experiments.data.errors import DataError
from experiments.distributed import parallel
from experiments.inception.comparison.runs import CONFIG_FILE, Run, group_runs
from experiments.inception.config import CONFIGURATION, CONVENTIONS
from experiments.inception.config import NETWORK as NETWORK_FIELDS
from experiments.inception.data import Data, LoadSplits
from experiments.inception.experiment import NETWORK, Experiment
from experiments.inception.network import Inception
from experiments.inception.training import POPULATION
from experiments.running.record import CHECKPOINTS
from experiments.running.workdir import WorkdirError
from experiments.training.state import TrainState

# An image is decoded once for all networks, so that they must see the same.
SHARED_KEYS = ("dataset", "image_size", "crop_fraction", "flip", "eval_batch_size")
# They tell no networks apart.
UNNAMED_KEYS = ("data", "data_checksum", *CONFIGURATION.keys(Role.LAUNCH))


class Network(NamedTuple):
    """A trained network, ready to be evaluated."""

    name: str  # different from that of every other network
    folder: Path
    config: dict[str, Any]
    step: int  # after which its state was saved
    statistics: str | None  # as asked for; None without batch normalisation
    experiment: Experiment
    state: TrainState  # but for the optimiser's


def check_runs(runs: Sequence[Run], statistics: str) -> None:
    """Checks, before any long work, that runs can be evaluated, and together.

    Args:
      runs: at least one.
      statistics: `POPULATION`, or else those of the checkpoints, moving averages.

    Raises:
      ConfigError: the runs do not see the same images.
      WorkdirError: a run diverged, has no such statistics yet, or is of another kind.
    """
    for run in runs:
        if missing := sorted(
            {*SHARED_KEYS, *NETWORK_FIELDS, "data"} - run.config.keys()
        ):
            raise WorkdirError(
                f"{run.folder / CONFIG_FILE} lacks {', '.join(missing)}: expected that "
                "of a run of experiments.inception; leave this run out."
            )
        if run.diverged_at is not None:
            raise WorkdirError(
                f"{run.folder} diverged at step {run.diverged_at:,}: expected a run "
                "that left a trained network; leave this one out."
            )
    first = runs[0]
    differences = [
        f"{key} ({first.config[key]} in {first.folder}, {run.config[key]} in "
        f"{run.folder})"
        for run in runs
        for key in SHARED_KEYS
        if run.config[key] != first.config[key]
    ]
    if differences:
        raise ConfigError(
            f"the runs differ in {', '.join(differences)}: expected networks that see "
            "the same images, in the same batches; evaluate them apart."
        )
    for run in runs:
        if not _folder(run, statistics).is_dir():
            raise _lacks_state(run, statistics)


def open_data(
    runs: Sequence[Run], data_dir: str | None, load: LoadSplits = load_splits
) -> Data:
    """Opens the data set that the runs share.

    Args:
      runs: as `check_runs` accepts them.
      data_dir: folder of prepared tensorflow-datasets, or None for their default.
      load: opens the training and the test examples.

    Raises:
      DataError: there is no such data set, or its test set is not that of the runs.
    """
    data = Data(CONFIGURATION.values() | runs[0].config, data_dir, load)
    for run in runs:
        differences = [
            f"{run.config['data'].get(key)} {key.replace('_', ' ')} there, {now} here"
            for key, now in data.description.items()
            # On part of the training set, say, a network may well have been trained.
            if not key.startswith("training_") and now != run.config["data"].get(key)
        ]
        if differences:
            raise DataError(
                f"{run.config['dataset']} is not what {run.folder} was trained with: "
                f"{'; '.join(differences)}; give the --data_dir of that run."
            )
    return data


def load_networks(
    runs: Sequence[Run],
    statistics: str,
    data: Data,
    network: type[nn.Module] = Inception,
) -> list[Network]:
    """Loads the newest state of each run; writes nothing to the runs' folders.

    Args:
      runs: as `check_runs` accepts them.
      statistics: as for `check_runs`.
      data: of `open_data`.
      network: the class that they are of.

    Raises:
      CheckpointError: a state is damaged.
      WorkdirError: a run has not saved any state yet.
    """
    groups = group_runs(runs, but=UNNAMED_KEYS)
    names = {
        run.folder: name if len(members) == 1 else f"{name}, {run.folder}"
        for name, members in groups.items()
        for run in members
    }
    networks = []
    for run in runs:
        # Networks that differ in how they were trained share what is compiled.
        keys = {*SHARED_KEYS, *NETWORK_FIELDS, *CONVENTIONS} & run.config.keys()
        config = CONFIGURATION.values() | {key: run.config[key] for key in keys}
        experiment = Experiment(config, data.test.num_classes, network)
        step, state = _restore(run, statistics, experiment)
        networks.append(
            Network(
                name=names[run.folder],
                folder=run.folder,
                config=run.config,
                step=step,
                statistics=statistics if run.config["batch_norm"] else None,
                experiment=experiment,
                state=state._replace(opt_state=()),
            )
        )
    return networks


def _restore(
    run: Run, statistics: str, experiment: Experiment
) -> tuple[int, TrainState]:
    # Its shapes are all that matters, and real ones would take long to compile.
    like = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, leaf.dtype),
        jax.eval_shape(experiment.initial_state),
    )
    folder = _folder(run, statistics)
    restored = restore_newest(folder, {NETWORK: parallel.replicate(like)})
    if restored is None:
        raise _lacks_state(run, statistics)
    return restored.step, restored.states[NETWORK]


def _folder(run: Run, statistics: str) -> Path:
    """The folder of the states that have the statistics."""
    by_population = run.config["batch_norm"] and statistics == POPULATION
    return run.folder / (POPULATION if by_population else CHECKPOINTS)


def _lacks_state(run: Run, statistics: str) -> WorkdirError:
    folder = _folder(run, statistics)
    if folder.name == POPULATION:
        return WorkdirError(
            f"{run.folder} has no statistics of the population, as its run is not "
            "finished: finish it, or give --statistics=moving_average."
        )
    return WorkdirError(
        f"{folder} holds no checkpoint yet: expected a run that has trained for "
        f"{run.config['checkpoint_every']:,} steps or to its end; evaluate it then."
    )
