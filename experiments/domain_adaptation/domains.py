"""New domains for a trained network: shifted images, and population statistics of them.

Section 5 of the paper suggests that batch normalisation lets a network adapt to new
data by recomputing the population statistics (Algorithm 2), and nothing else.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.data.image_set import ImageSet
from experiments.mnist.experiment import Experiment
from experiments.mnist.training import train
from experiments.running.tables import spread, table

# Of uint8 images; the same noise in every run.
NOISE_STD = 64
DOMAINS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "as trained on": lambda images: images,
    "inverted contrast": lambda images: 255 - images,
    "added noise": lambda images: _add_noise(images),
    "a quarter of the brightness": lambda images: images // 4,
}


def _add_noise(images: np.ndarray) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, NOISE_STD, images.shape)
    return np.clip(images + noise, 0, 255).astype(np.uint8)


def measure(config: Mapping[str, Any], data: ImageSet) -> dict[str, Any]:
    """Trains networks on a set, and measures them on its domains.

    Args:
      config: keys as `experiments.mnist.config.FIELDS` describes them.
      data: what to train on.

    Returns:
      For each domain and network, accuracies in percent on its test images, one a
      seed: with the moving averages of training ("old"), and with population
      statistics of the domain's training images, whose labels are not used ("new").
    """
    experiment = Experiment(config, data)
    states = train(experiment).states
    results = {}
    for domain, shift in DOMAINS.items():
        shifted = data._replace(
            train_images=shift(data.train_images), test_images=shift(data.test_images)
        )
        # The same networks, looking at other images.
        looking = Experiment(config, shifted)
        old = looking.accuracy(states)
        new = looking.population_accuracy(states, config["num_steps"])
        results[domain] = {
            network: {"old": old[network].tolist(), "new": new[network].tolist()}
            for network in states
        }
    return results


def page(results: Mapping[str, Any]) -> str:
    """The results as a Markdown table: mean and deviation over seeds."""
    header = (
        "test images",
        "without batch normalisation",
        "with, statistics of training",
        "with, re-estimated",
    )
    rows = [
        (
            domain,
            _spread(networks["baseline"]["old"]),
            _spread(networks["batch_norm"]["old"]),
            _spread(networks["batch_norm"]["new"]),
        )
        for domain, networks in results.items()
    ]
    return table(header, rows)


def _spread(values: Sequence[float]) -> str:
    std = np.std(values, ddof=1) if len(values) > 1 else None
    return spread({"mean": np.mean(values), "std": std})
