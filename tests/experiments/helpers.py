"""What several tests of the experiments share: small runs, and commands."""

import ast
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.data.image_set import ImageSet
from experiments.distributed import parallel
from experiments.mnist.config import get_config
from experiments.mnist.network import MLP
from experiments.mnist.training import run
from experiments.training.state import TrainState
from experiments.training.steps import init_state

REPOSITORY = Path(__file__).parents[2]

# Everything in a workdir that is the same, bit for bit, however often a run stopped.
RESULTS = (
    *("metrics.jsonl", "percentiles.jsonl", "summary.json", "config.json"),
    *("figure1.png", "figure1.svg"),
)

# A filter of warnings: when one of Orbax's many reads or writes fails, the others are
# left unfinished, and call into an event loop that is closed.
ORBAX_LEFTOVERS = (
    "ignore:Exception ignored in. (None|<coroutine object)"
    ":pytest.PytestUnraisableExceptionWarning"
)


def small_config(**changes: Any) -> dict[str, Any]:
    """A run of seconds, whose steps all come in chunks of ten."""
    small = {
        "hidden": (8, 6),
        "num_steps": 40,
        "batch_size": 64,
        "num_seeds": 2,
        "population_batches": 4,
        "eval_every": 20,
        "early_eval_every": 10,
        "early_steps": 20,
        "milestones": (10,),
        "probe_examples": 50,
        "checkpoint_every": 10,
        "decay": 0.9,
    }
    return get_config().to_dict() | small | changes


def make_image_set(num_train: int = 512, num_test: int = 101) -> ImageSet:
    """Images of 5 x 4 pixels whose label shows in their brightness."""
    random = np.random.default_rng(0)

    def make(num_examples: int) -> tuple[np.ndarray, np.ndarray]:
        labels = random.integers(0, 4, num_examples, dtype=np.int32)
        noise = random.integers(0, 80, (num_examples, 5, 4, 1))
        return (noise + 58 * labels[:, None, None, None]).astype(np.uint8), labels

    return ImageSet(*make(num_train), *make(num_test), num_classes=4)


def run_small(config: Mapping[str, Any], workdir: Path) -> None:
    """Runs the MNIST experiment on images that need no reading."""
    run(config, workdir, None, load=lambda *_: make_image_set())


def make_models(**options: Any) -> dict[str, MLP]:
    options = {"hidden": (8, 6), "num_classes": 4} | options
    return {
        "baseline": MLP(batch_norm=False, axis_name=parallel.DEVICE_AXIS, **options),
        "batch_norm": MLP(batch_norm=True, axis_name=parallel.DEVICE_AXIS, **options),
    }


def make_states(
    models: Mapping[str, MLP],
    num_inputs: int,
    seeds: tuple[int, ...] = (0, 1),
    rates: tuple[float, ...] = (0.5, 0.5),
) -> dict[str, TrainState]:
    """Replicated initial states, with parameters that are not zero or one anywhere."""
    states = {}
    for name, model in models.items():

        def init(seed: Any, rate: Any, model: MLP = model) -> TrainState:
            state = init_state(model, (num_inputs,), jax.random.key(seed), rate)
            leaves, structure = jax.tree.flatten((state.params, state.batch_stats))
            keys = jax.random.split(jax.random.key(seed + 99), len(leaves))
            shaken = [
                leaf + 0.3 * jax.random.uniform(key, leaf.shape)
                for key, leaf in zip(keys, leaves, strict=True)
            ]
            params, batch_stats = structure.unflatten(shaken)
            return state._replace(params=params, batch_stats=batch_stats)

        vectorised = jax.jit(jax.vmap(init))
        states[name] = vectorised(np.array(seeds), np.array(rates, np.float32))
    return parallel.replicate(states)


def assert_trees_identical(found: Any, expected: Any) -> None:
    """The same structure, dtypes, shapes and bits."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    for one, other in pairs:
        one, other = np.asarray(one), np.asarray(other)
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert one.tobytes() == other.tobytes()


def read_files(directory: Path, *, but: tuple[str, ...] = ()) -> dict[str, bytes]:
    """The content of every file below a directory, by its relative path."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name not in but
    }


def documentation_of(command: str) -> str:
    """What a command's --help says first.

    Read, not imported: commands define flags, and several define the same ones.
    """
    place = REPOSITORY / "experiments" / command
    path = place / "__main__.py" if place.is_dir() else place.with_suffix(".py")
    source = path.read_text()
    return ast.get_docstring(ast.parse(source), clean=False) or ""


def command_line(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "experiments.mnist", *arguments]


def command_environment(**variables: str) -> dict[str, str]:
    """The environment of a user with one CPU device: nothing is forced."""
    unforced = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    return unforced | {"JAX_PLATFORMS": "cpu"} | variables


def run_command(
    *arguments: str, module: str = "experiments.mnist", **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs a command in the repository."""
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=REPOSITORY,
        env=command_environment(**variables),
        capture_output=True,
        text=True,
        check=False,
    )
