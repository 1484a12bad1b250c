import json
import subprocess
import sys

import jax
import numpy as np
import pytest

import bn_jax
from experiments.domain_adaptation import domains
from experiments.mnist.experiment import Experiment
from tests.experiments.helpers import (
    REPOSITORY,
    command_environment,
    make_image_set,
    small_config,
)

CONFIG = small_config(binarise=False, num_steps=30)


@pytest.fixture(scope="module")
def results():
    return domains.measure(CONFIG, make_image_set())


def test_domains_are_images_and_always_the_same():
    images = make_image_set().test_images
    for shift in domains.DOMAINS.values():
        shifted = shift(images)
        assert (shifted.shape, shifted.dtype) == (images.shape, np.uint8)
        np.testing.assert_array_equal(shifted, shift(images))
    noise = np.int32(domains.DOMAINS["added noise"](np.full(9999, 128, np.uint8)))
    assert abs(noise.mean() - 128) < 2
    assert 55 < noise.std() < domains.NOISE_STD


def test_measures_every_network_and_seed(results):
    assert list(results) == list(domains.DOMAINS)
    for networks in results.values():
        for accuracies in networks.values():
            for values in accuracies.values():
                assert len(values) == CONFIG["num_seeds"]
                assert all(0 <= value <= 100 for value in values)
        # Nothing to estimate.
        assert networks["baseline"]["old"] == networks["baseline"]["new"]


def test_the_first_domain_is_that_of_training(results):
    experiment = Experiment(CONFIG, make_image_set())
    indices = experiment.feed.indices(0, 30)
    states, _ = experiment.step(experiment.initial_states(), 0, indices)
    found = results["as trained on"]["batch_norm"]
    assert found["old"] == experiment.accuracy(states)["batch_norm"].tolist()
    new = experiment.population_accuracy(states, 30)["batch_norm"]
    assert found["new"] == new.tolist()


def test_inversion_is_a_change_of_sign_that_no_statistics_undo():
    # What the page says of inverted contrast.
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (64, 20)).astype(np.float32)
    weights = random.normal(size=(20, 5)).astype(np.float32)
    params, stats = bn_jax.init_params(5), bn_jax.init_stats(5)

    def run(stats, x):
        return bn_jax.batch_norm(params, stats, x, train=True)[1]

    def adapted(x):
        found = bn_jax.population_statistics(jax.jit(run), stats, [x])
        return bn_jax.batch_norm(params, found, x, train=False)[0]

    upright, inverted = adapted(images @ weights), adapted((255 - images) @ weights)
    np.testing.assert_allclose(inverted, -upright, atol=1e-4)


def test_table(results):
    page = domains.page(results)
    lines = page.splitlines()
    assert len(lines) == 2 + len(domains.DOMAINS)
    assert domains._spread(results["added noise"]["batch_norm"]["new"]) in page
    assert domains._spread([90.0, 92.0]) == "91.00 ± 1.41"
    assert domains._spread([90.0]) == "90.00"


def run_command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "experiments.domain_adaptation", *arguments],
        cwd=REPOSITORY,
        env=command_environment(),
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_argument_is_unexpected():
    done = run_command("runs/mnist")
    assert done.returncode == 1
    assert done.stderr == "error: unexpected argument 'runs/mnist' (see --help).\n"


@pytest.mark.slow
def test_re_estimation_recovers_brightness_and_most_of_noise(tmp_path):
    done = run_command("--num_steps=1000", f"--workdir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "domains.md").read_text() in done.stdout + "\n"
    found = {
        domain: {key: np.mean(values) for key, values in of["batch_norm"].items()}
        for domain, of in json.loads((tmp_path / "domains.json").read_text())[
            "domains"
        ].items()
    }
    trained = found["as trained on"]["new"]
    assert trained > 90
    darker = found["a quarter of the brightness"]
    assert abs(darker["new"] - trained) < 0.5
    assert darker["old"] < trained - 10
    noisy = found["added noise"]
    assert noisy["old"] + 5 < noisy["new"] < trained
