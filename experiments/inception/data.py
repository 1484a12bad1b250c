"""The examples of an Inception run, divided over its processes."""

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import jax

from experiments.configuration.fields import ConfigError
from experiments.data.core_processes import all_cores
from experiments.data.datasets import load_splits
from experiments.data.device_augmentation import DeviceExamples
from experiments.data.device_feed import DeviceFeed, fits_on_device
from experiments.data.file_feed import (
    ImageBatch,
    UndecodableImages,
    evaluation_batches,
    training_batches,
)
from experiments.data.splits import Augmentation, Split
from experiments.distributed import parallel

LoadSplits = Callable[[str, str | None, Augmentation], tuple[Split, Split]]
# On CPU a convolutional step in a compiled loop takes several times its time.
STEPS_PER_PIECE = {"cpu": 1}
STEPS_PER_PIECE_ELSEWHERE = 20


class Data:
    """The examples of a run, in batches as training and evaluation take them."""

    def __init__(
        self,
        config: Mapping[str, Any],
        data_dir: str | None,
        load: LoadSplits = load_splits,
    ) -> None:
        """Opens the data set that the configuration names.

        Args:
          config: as `experiments.inception.config.FIELDS` describes it.
          data_dir: folder of prepared tensorflow-datasets, or None.
          load: opens the training and the test examples.

        Raises:
          ConfigError: a batch is larger than the training set, the set does not fit
            on the devices though it shall, or it lies in one file, which leaves
            nothing to shuffle.
          DataError: there is no such data set, or it cannot be read.
        """
        self._config = config
        # Of every batch, for this process' devices.
        self._part = (jax.process_index(), jax.process_count())
        augmentation = Augmentation(*(config[field] for field in Augmentation._fields))
        self.train, self.test = load(config["dataset"], data_dir, augmentation)
        workers = config["workers"]
        self._workers = all_cores() if workers < 0 else workers
        self._undecodable = UndecodableImages(config["max_undecodable"])
        if config["batch_size"] > len(self.train):
            raise ConfigError(
                f"--config.batch_size={config['batch_size']} is more than the "
                f"{len(self.train)} training examples; use a smaller one."
            )
        if config["shuffle"] == "shards" and len(self.train.shard_lengths) < 2:
            raise ConfigError(
                "--config.shuffle=shards: the training examples lie in one file, so "
                "that every epoch would have the same order: expected several files; "
                "use --config.shuffle=examples."
            )
        self.on_device = self._is_on_device()
        self._tested: dict[int, list[ImageBatch]] = {}  # by their number

    def _is_on_device(self) -> bool:
        """Whether training examples lie on the devices, or come from files."""
        feed, num_bytes = self._config["feed"], self.train.device_bytes
        fits = num_bytes is not None and fits_on_device(num_bytes)
        if feed == "device" and not fits:
            size = "of several sizes" if num_bytes is None else f"{num_bytes:,} bytes"
            raise ConfigError(
                f"--config.feed=device: the training images are {size}: expected some "
                "of one size that fit on every device; use feed=files."
            )
        # A CPU has nothing to gain: it would decode and augment on the same cores.
        return feed == "device" or (
            feed == "auto" and fits and jax.default_backend() != "cpu"
        )

    @property
    def description(self) -> dict[str, Any]:
        """What tells one version of the data from another, as JSON values."""
        return {
            "training_examples": len(self.train),
            "training_checksum": self.train.checksum,
            "test_examples": len(self.test),
            "classes": self.train.num_classes,
        }

    def device_examples(self) -> DeviceExamples:
        """The training examples, decoded; those that cannot be are counted."""
        return self.train.device_examples(self._undecodable.add)

    def feed(self, first: int, stops: Sequence[int]) -> Generator[tuple[int, Any]]:
        """What `fit` takes its steps on: batches, or indices of `device_examples`."""
        if self.on_device:
            config, backend = self._config, jax.default_backend()
            yield from DeviceFeed(
                [config["seed"]],
                len(self.train),
                config["batch_size"],
                self.train.shard_lengths if config["shuffle"] == "shards" else None,
                STEPS_PER_PIECE.get(backend, STEPS_PER_PIECE_ELSEWHERE),
            )(first, stops)
        elif stops:
            for batch in self._ahead(self.training(first, stops[-1])):
                yield 1, batch

    def _ahead(self, batches: Generator[ImageBatch]) -> Generator[ImageBatch]:
        """Copies each batch to the devices while they compute on the one before."""
        try:
            before = None
            for batch in batches:
                placed = ImageBatch(*map(parallel.place, batch))
                if before is not None:
                    yield before
                before = placed
            if before is not None:
                yield before
        finally:
            batches.close()

    def training(self, first: int, last: int) -> Generator[ImageBatch]:
        """The batches of the steps from `first` to before `last`, from files."""
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

        Several crops share out a batch's images among fewer examples. Where training
        examples lie on the devices, single crops do, too, after the first time.
        """
        count = min(num_examples or len(self.test), len(self.test))
        num_bytes = count * 3 * self._config["image_size"] ** 2
        if crops > 1 or not self.on_device or not fits_on_device(num_bytes):
            yield from self._testing(count, crops)
            return
        if count not in self._tested:
            self._tested[count] = [
                ImageBatch(*map(parallel.place, batch))
                for batch in self._testing(count, crops)
            ]
        yield from self._tested[count]

    def _testing(self, count: int, crops: int) -> Generator[ImageBatch]:
        config, devices = self._config, jax.device_count()
        batch_size = config["eval_batch_size"] // crops // devices * devices
        return evaluation_batches(
            self.test,
            count,
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
