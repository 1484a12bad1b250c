"""Runs of the MNIST experiment that several tests look at or go on with."""

import gc
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.experiments.helpers import run_small, small_config


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """The workdir of an uninterrupted run, not to be changed."""
    workdir = tmp_path_factory.mktemp("finished")
    run_small(small_config(), workdir)
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
