"""The feed's images a second against workers, beside other pipelines; and the wait.

JPEGs, those of --images or else synthetic ones of 500 x 375, from memory; random crops
resized to 224, and mirrored. The feed of the experiments and torch's DataLoader make
them in as many worker processes as the row says; the decoder alone decodes whole images
with OpenCV in as many processes; tf.data, in the Python that --tensorflow_python names,
in as many threads. Every contestant runs alone: its workers start, make some batches,
and are timed for the next. The last line trains Inception (64 x 64, width 1/4) from the
feed and tells the share of the time for which the step waits for its images.
"""

import argparse
import importlib.util
import multiprocessing
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import jax
import numpy as np

from benchmarks import network, results
from experiments.data.core_processes import all_cores
from experiments.data.crops import training_crop
from experiments.data.device_augmentation import DeviceExamples
from experiments.data.file_feed import UndecodableImages, training_batches
from experiments.data.splits import Augmentation, Example

SYNTHETIC_IMAGES, BATCH, SIZE = 256, 32, 224
WARM_UP, BATCHES = 8, 40  # that a contestant makes before it is timed, and then
EPOCH = 2_560  # examples: files are repeated, as real sets are larger
HEIGHT, WIDTH, QUALITY = 375, 500, 92
ROUNDS = 5
FEED, DECODER = "bn_jax's experiments", "OpenCV's decoder alone"


class MemorySplit:
    """Encoded images in memory, as a split of training examples."""

    num_classes = 10
    device_bytes = None
    checksum = ""

    def __init__(self, encoded: Sequence[bytes], image_size: int) -> None:
        """Takes the files' contents and the size of crops."""
        self._encoded = encoded
        self._augmentation = Augmentation(image_size, 0.08, True, 0.875)
        self.shard_lengths = (len(self),)

    def __len__(self) -> int:
        """The number of examples."""
        return max(len(self._encoded), EPOCH)

    def device_examples(self, report: Callable[[str], None]) -> DeviceExamples:
        """Not needed: the images have several sizes."""
        raise NotImplementedError

    def training_example(self, index: int, random: np.random.Generator) -> Example:
        """Decodes and augments an image."""
        encoded = self._encoded[index % len(self._encoded)]
        crop = training_crop(encoded, self._augmentation, random)
        return Example(crop, index % self.num_classes)

    def evaluation_example(self, index: int, crops: int) -> Example:
        """Not needed to train."""
        raise NotImplementedError


class Torch:
    """The same images as a map-style data set of torch's."""

    def __init__(self, split: MemorySplit) -> None:
        """Takes the images."""
        self._split = split

    def __len__(self) -> int:
        """The number of examples that one run takes."""
        return BATCH * (WARM_UP + BATCHES + 100)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """Decodes and augments an image, by a generator of its own."""
        random = np.random.default_rng(index)
        example = self._split.training_example(index % len(self._split), random)
        return example.images, example.label


def main(arguments: argparse.Namespace) -> None:
    """Measures, prints a table and writes the results."""
    rounds = arguments.rounds or (1 if arguments.tiny else ROUNDS)
    machine = results.machine()
    encoded = read_images(arguments.images, 8 if arguments.tiny else SYNTHETIC_IMAGES)
    cores = all_cores()
    workers = [2**power for power in range(cores.bit_length())]
    contestants = [(FEED, count, _feed) for count in workers]
    contestants += [(DECODER, count, _decoder) for count in workers]
    if importlib.util.find_spec("torch"):
        contestants += [("torch's DataLoader", count, _torch) for count in workers]
    else:
        print("skipped, not installed: torch")
    if arguments.tensorflow_python:
        start = _TensorFlow(arguments.tensorflow_python)
        contestants += [("tf.data", count, start) for count in workers]
    else:
        print("skipped: tf.data, since no --tensorflow_python is given")
    if arguments.tiny:
        contestants = [entry for entry in contestants if entry[1] == 1]
    batches = 2 if arguments.tiny else BATCHES
    rates: dict[tuple[str, int], list[float]] = {}
    for _ in range(rounds):
        for name, count, start in contestants:
            rate = images_per_second(start(encoded, count), batches)
            rates.setdefault((name, count), []).append(rate)
    rows = []
    for (name, count), found in rates.items():
        alone = np.array(rates[DECODER, count])
        low, median, high = np.percentile(found, (25, 50, 75))
        row = {"low": low, "images_per_second": median, "high": high}
        row["share_of_decoder"] = np.median(np.array(found) / alone)
        rows.append({"name": name, "workers": count} | _plain(row))
    body = [list(row.values()) for row in rows]
    print(results.table(list(rows[0]), body))
    waiting = waiting_share(encoded, cores, 2 if arguments.tiny else 30)
    print(f"a training step waits for its images {100 * waiting:.1f}% of its time")
    size = float(np.mean([len(image) for image in encoded])) / 1e3
    results.write(
        arguments.output,
        {
            "machine": machine,
            "images": "files" if arguments.images else "synthetic",
            "kilobytes_an_image": size,
            "waiting_share": waiting,
            "rows": rows,
        },
    )


def read_images(folder: str | None, number: int) -> list[bytes]:
    """The JPEGs of a folder, or synthetic ones without any."""
    if folder is None:
        return make_images(number)
    paths = [p for p in sorted(Path(folder).iterdir()) if p.suffix.lower() in SUFFIXES]
    if not paths:
        raise SystemExit(f"error: --images={folder}: expected a folder of JPEGs.")
    return [path.read_bytes() for path in paths]


SUFFIXES = (".jpg", ".jpeg")


def make_images(number: int) -> list[bytes]:
    """JPEGs with structure at all scales, about as large as ImageNet's."""
    rng = np.random.default_rng(0)
    encoded = []
    for _ in range(number):
        image = np.zeros((HEIGHT, WIDTH, 3), np.float32)
        for scale in (4, 8, 16, 32, 64, 128):
            noise = rng.normal(0, 1, (HEIGHT // scale + 2, WIDTH // scale + 2, 3))
            image += scale**0.6 * cv2.resize(noise.astype(np.float32), (WIDTH, HEIGHT))
        image += rng.normal(0, 1.2, image.shape)
        pixels = np.clip(128 + 6 * image, 0, 255).astype(np.uint8)
        quality = [cv2.IMWRITE_JPEG_QUALITY, QUALITY]
        encoded.append(cv2.imencode(".jpg", pixels, quality)[1].tobytes())
    return encoded


def images_per_second(batches: Generator[int], count: int) -> float:
    """How fast a pipeline is, once it runs; ends it.

    Args:
      batches: yields how many images it has made.
      count: batches to time.
    """
    for _ in range(WARM_UP):
        next(batches)
    began = time.perf_counter()
    made = sum(next(batches) for _ in range(count))
    seconds = time.perf_counter() - began
    batches.close()
    return made / seconds


def waiting_share(encoded: Sequence[bytes], workers: int, steps: int) -> float:
    """Trains some steps from the feed; returns the share of the time waited."""
    batches = feed(encoded, 64, workers)
    model = network.make_network(
        "inception", network.contestants()["bn_jax"].norm, 1 / 4, "float32"
    )
    first = next(batches)
    images = first.images.astype(np.float32)
    variables = model.init(jax.random.key(0), images[:2], train=True)
    step = jax.jit(lambda *args: network.train_step(model, None, *args))
    waited = total = 0.0
    for number in range(steps + 1):
        begin = time.perf_counter()
        batch = next(batches)
        ready = time.perf_counter()
        params, new = step(
            variables, batch.images.astype(np.float32) / 255, batch.labels
        )
        variables = jax.block_until_ready({"params": params, **new})
        if number:  # the first compiles
            waited += ready - begin
            total += time.perf_counter() - begin
    batches.close()
    return waited / total


def feed(encoded: Sequence[bytes], image_size: int, workers: int) -> Any:
    """The feed of the experiments, without end."""
    return training_batches(
        MemorySplit(encoded, image_size),
        range(1 << 30),
        seed=0,
        batch_size=BATCH,
        shuffle="examples",
        workers=workers,
        undecodable=UndecodableImages(0),
    )


def _feed(encoded: Sequence[bytes], workers: int) -> Generator[int]:
    batches = feed(encoded, SIZE, workers)
    try:
        for batch in batches:
            yield len(batch.labels)
    finally:
        batches.close()


def _torch(encoded: Sequence[bytes], workers: int) -> Generator[int]:
    from torch.utils.data import DataLoader

    images: Any = Torch(MemorySplit(encoded, SIZE))
    loader = DataLoader(
        images, BATCH, num_workers=workers, multiprocessing_context="spawn"
    )
    for _, labels in loader:
        yield len(labels)


def _decoder(encoded: Sequence[bytes], workers: int) -> Generator[int]:
    chosen = [encoded[i % len(encoded)] for i in range(workers * BATCH)]
    parts = [chosen[i::workers] for i in range(workers)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context) as pool:
        while True:
            yield sum(pool.map(_decode, parts))


def _decode(encoded: Sequence[bytes]) -> int:
    cv2.setNumThreads(0)
    for image in encoded:
        cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR_RGB)
    return len(encoded)


class _TensorFlow:
    """tf.data in another Python."""

    def __init__(self, python: str) -> None:
        self._python = python

    def __call__(self, encoded: Sequence[bytes], workers: int) -> Generator[int]:
        with tempfile.TemporaryDirectory() as folder:
            for number, image in enumerate(encoded):
                (Path(folder) / f"{number:04}.jpeg").write_bytes(image)
            script = Path(__file__).with_name("tensorflow_input.py")
            arguments = [folder, str(SIZE), str(BATCH), str(workers)]
            with subprocess.Popen(
                [self._python, str(script), *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            ) as process:
                assert process.stdin
                assert process.stdout
                try:
                    while True:
                        print(1, file=process.stdin, flush=True)
                        process.stdout.readline()
                        yield BATCH
                finally:
                    process.stdin.close()


def _plain(row: dict[str, Any]) -> dict[str, float]:
    return {key: float(value) for key, value in row.items()}


if __name__ == "__main__":
    given = results.parse(
        __doc__,
        "input",
        tensorflow_python="a Python that has TensorFlow",
        images="a folder of JPEGs (default: synthetic ones)",
    )
    if given.cores is not None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-given.cores :])
    main(given)
