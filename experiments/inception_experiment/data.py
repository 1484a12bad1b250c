"""The examples of an Inception run, divided over its processes."""

from collections.abc import Generator, Mapping
from typing import Any

import jax

from experiments.configs.checks import ConfigError
from experiments.data.datasets import load_splits
from experiments.data.file_feed import (
    ImageBatch,
    UndecodableImages,
    all_cores,
    evaluation_batches,
    training_batches,
)
from experiments.data.splits import Augmentation


class Data:
    """The examples of a run, in batches as training and evaluation take them."""

    def __init__(self, config: Mapping[str, Any], data_dir: str | None) -> None:
        """Opens the data set that the configuration names.

        Raises:
          ConfigError: a batch is larger than the training set.
          DataError: there is no such data set, or it cannot be read.
        """
        self._config = config
        # Of every batch, for this process' devices.
        self._part = (jax.process_index(), jax.process_count())
        augmentation = Augmentation(*(config[field] for field in Augmentation._fields))
        self.train, self.test = load_splits(config["dataset"], data_dir, augmentation)
        workers = config["workers"]
        self._workers = all_cores() if workers < 0 else workers
        self._undecodable = UndecodableImages(config["max_undecodable"])
        if config["batch_size"] > len(self.train):
            raise ConfigError(
                f"--config.batch_size={config['batch_size']} is more than the "
                f"{len(self.train)} training examples; use a smaller one."
            )

    @property
    def description(self) -> dict[str, int]:
        """What tells one version of the data from another, as JSON values."""
        return {
            "training_examples": len(self.train),
            "test_examples": len(self.test),
            "classes": self.train.num_classes,
        }

    def training(self, first: int, last: int) -> Generator[ImageBatch]:
        """The batches of the steps from `first` to before `last`."""
        config = self._config
        return training_batches(
            self.train,
            range(first, last),
            seed=config["seed"],
            batch_size=config["batch_size"],
            shuffle=config["shuffle"],
            workers=self._workers,
            undecodable=self._undecodable,
            part=self._part,
        )

    def testing(self, num_examples: int = 0, crops: int = 1) -> Generator[ImageBatch]:
        """The first test examples, or (0) all of them.

        Several crops share out a batch's images among fewer examples.
        """
        config, devices = self._config, jax.device_count()
        batch_size = config["eval_batch_size"] // crops // devices * devices
        return evaluation_batches(
            self.test,
            min(num_examples or len(self.test), len(self.test)),
            batch_size=max(batch_size, devices),
            crops=crops,
            workers=self._workers,
            undecodable=self._undecodable,
            part=self._part,
        )

    def report_undecodable(self) -> None:
        """Names the images that could not be decoded."""
        if messages := sorted(self._undecodable.messages):
            print(
                f"{len(messages)} images could not be decoded:", *messages, sep="\n  "
            )
