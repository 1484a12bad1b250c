"""The sequential MNIST experiment at a small size."""

import jax
import numpy as np
import PIL.Image
import pytest

from experiments.configuration.fields import ConfigError
from experiments.running import stopping
from experiments.running.metrics import read_rows
from experiments.running.workdir import read_json
from experiments.sequential_mnist import training
from experiments.sequential_mnist.config import get_config
from experiments.sequential_mnist.network import SequenceClassifier
from experiments.sequential_mnist.summary import PAPER
from tests.experiments.helpers import make_image_set

# Images of 5 x 4 pixels.
CONFIG = get_config().to_dict() | {
    "pixels_per_step": 5,
    "units": 3,
    "num_steps": 4,
    "batch_size": 16,
    "eval_every": 2,
    "checkpoint_every": 2,
    "population_batches": 2,
}
NETWORKS = ("bn_lstm", "permuted_lstm")
RESULTS = ("metrics.jsonl", "summary.json", "config.json", "results.md", "accuracy.svg")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that was stopped on its way, and one that was not."""
    folders = [tmp_path_factory.mktemp(name) for name in ("stopped", "whole")]
    config = CONFIG | {"networks": NETWORKS, "num_seeds": 1}

    def run(folder):
        training.run(config, folder, None, load=lambda *_: make_image_set())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stopping, "is_asked", lambda: True)
        with pytest.raises(stopping.Stopped):
            run(folders[0])
    for folder in folders:
        run(folder)
    return folders


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_with_the_same_numbers(finished):
    stopped, whole = finished
    for name in RESULTS:
        assert (stopped / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
def test_the_paper_stands_beside_the_results(finished):
    folder = finished[1]
    summary = read_json(folder / "summary.json")
    page = (folder / "results.md").read_text()
    for name, of in summary["networks"].items():
        assert of["paper"] == PAPER[name]
        assert f"| {PAPER[name]:.1f}" in page
        assert of["steps"] == [0, 2, 4]
    rows = read_rows(folder / "metrics.jsonl")
    assert [(row["step"], row["network"]) for row in rows] == [
        (step, name) for step in (0, 2, 4) for name in NETWORKS
    ]
    PIL.Image.open(folder / "accuracy.png").verify()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pixels_per_step": 3}, "expected a divisor of the 20 values"),
        ({"batch_size": 1_000}, "more than the 512 training examples"),
    ],
)
def test_a_configuration_that_does_not_fit_the_data(changes, message):
    with pytest.raises(ConfigError, match=message):
        training.check_data(CONFIG | changes, make_image_set())


def test_permuted_pixels_are_the_same_pixels_in_another_order():
    options = {"units": 3, "num_classes": 4, "batch_norm": False, "pixels_per_step": 5}
    in_order = SequenceClassifier(**options)
    permuted = in_order.clone(permutation_seed=7)
    images = np.random.default_rng(0).random((2, 20), np.float32)
    variables = in_order.init(jax.random.key(0), images, train=True)
    order = np.random.default_rng(7).permutation(20)
    np.testing.assert_array_equal(
        permuted.apply(variables, images, train=False),
        in_order.apply(variables, images[:, order], train=False),
    )


def test_the_forget_gates_start_open():
    network = SequenceClassifier(3, 4, True, 5)
    variables = network.init(jax.random.key(0), np.zeros((1, 20)), train=True)
    cell = variables["params"]["BatchNormLSTMCell_0"]
    np.testing.assert_array_equal(cell["bias"], [0] * 3 + [1] * 3 + [0] * 6)
    np.testing.assert_array_equal(cell["recurrent_kernel"][:, 6:9], np.eye(3))
    np.testing.assert_array_equal(cell["input_scale"], np.full(12, np.float32(0.1)))
