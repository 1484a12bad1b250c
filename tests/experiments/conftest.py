"""Runs of the MNIST experiment that several tests look at or go on with."""

import contextlib
import gc
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from experiments.data.image_set import load_image_set
from experiments.distributed import parallel
from experiments.mnist import training as mnist_training
from tests.experiments.helpers import make_image_set, small_config


@pytest.fixture(scope="session")
def make_runs_small():
    """A context with a small data set and one compiled experiment a configuration."""
    experiments = {}
    data = make_image_set()
    original = mnist_training.Experiment

    def make_experiment(config, image_set):
        key = (json.dumps(config), image_set.train_images.tobytes())
        if key not in experiments:
            experiment = original(config, image_set)
            states = jax.device_get(experiment.initial_states())
            experiment.initial_states = lambda: parallel.replicate(states)
            experiments[key] = experiment
        return experiments[key]

    def load(name, data_dir):
        return load_image_set(name, data_dir) if data_dir else data

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mnist_training, "Experiment", make_experiment)
            patch.setattr(mnist_training, "load_image_set", load)
            yield

    return context


@pytest.fixture
def small_runs(make_runs_small):
    with make_runs_small():
        yield


@pytest.fixture(scope="session")
def finished(tmp_path_factory, make_runs_small) -> Path:
    """The workdir of an uninterrupted run, not to be changed."""
    workdir = tmp_path_factory.mktemp("finished")
    with make_runs_small():
        mnist_training.run(small_config(), workdir, None)
    return workdir


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "copied")


@pytest.fixture
def collect_dropped_coroutines() -> Iterator[None]:
    """What Orbax drops is collected, and warns, within the test that drops it."""
    gc.freeze()  # or all objects of JAX would be looked through, which takes seconds
    yield
    gc.collect()
    gc.unfreeze()
