"""JPEG pipelines: ours, tf.data and the decoder alone; and how long training waits.

Synthetic JPEGs of 500 x 375, from memory; random crops resized to 224, and mirrored.
The decoder alone decodes the whole images with OpenCV in as many threads as there are
cores. tf.data runs in the Python that --tensorflow_python names, and is skipped without
one. The last row trains Inception (64 x 64, width 1/4) from our pipeline and tells the
share of the time for which the step waits for its images.
"""

import argparse
import itertools
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import jax
import numpy as np

from benchmarks import measuring, network, results
from experiments.data.crops import training_crop
from experiments.data.file_feed import UndecodableImages, training_batches
from experiments.data.splits import Augmentation, Example

IMAGES, BATCH, BATCHES_A_ROUND = 256, 32, 8
HEIGHT, WIDTH, QUALITY = 375, 500, 92
ROUNDS = 7


class MemorySplit:
    """Encoded images in memory, as a split of training examples."""

    num_classes = 10

    def __init__(self, encoded: Sequence[bytes], image_size: int) -> None:
        """Takes the files' contents and the size of crops."""
        self._encoded = encoded
        self._augmentation = Augmentation(image_size, 0.08, True, 0.875)
        self.shard_lengths = (len(encoded),)

    def __len__(self) -> int:
        """The number of images."""
        return len(self._encoded)

    def training_example(self, index: int, random: np.random.Generator) -> Example:
        """Decodes and augments an image."""
        crop = training_crop(self._encoded[index], self._augmentation, random)
        return Example(crop, index % self.num_classes)

    def evaluation_example(self, index: int, crops: int) -> Example:
        """Not needed to train."""
        raise NotImplementedError


def main(arguments: argparse.Namespace) -> None:
    """Measures, prints a table and writes the results."""
    rounds = arguments.rounds or (2 if arguments.tiny else ROUNDS)
    count = 1 if arguments.tiny else BATCHES_A_ROUND
    machine = results.machine()
    encoded = make_images(16 if arguments.tiny else IMAGES)
    cores = len(os.sched_getaffinity(0))
    batches = _batches(encoded, 224, cores)
    pool = ThreadPoolExecutor(cores)

    def decode_alone(turn: int) -> None:
        chosen = [encoded[i % len(encoded)] for i in range(count * BATCH)]
        list(pool.map(_decode, chosen))

    calls: dict[str, Callable[[int], Any]] = {
        "bn_jax's experiments": lambda turn: list(itertools.islice(batches, count)),
        "OpenCV's decoder alone": decode_alone,
    }
    with tempfile.TemporaryDirectory() as folder:
        for number, image in enumerate(encoded):
            (Path(folder) / f"{number:04}.jpeg").write_bytes(image)
        python = arguments.tensorflow_python
        other = _TensorFlow(python, folder) if python else None
        if other is None:
            print("skipped: tf.data, since no --tensorflow_python is given")
        timings = measuring.time_in_turns(calls, rounds)
        if other is not None:
            # It keeps its own time, which on one core is its processor's.
            timings |= _against(calls, other, count, rounds)
            other.close()
    rows = [
        {
            "name": name,
            **timing._asdict(),
            "images_per_second": 1e3 * count * BATCH / timing.median,
            "images_per_second_and_core": 1e3 * count * BATCH / timing.median / cores,
        }
        for name, timing in timings.items()
    ]
    columns = {
        "": "name",
        "images/s": "images_per_second",
        "per core": "images_per_second_and_core",
        "time/ours": "ratio",
    }
    body = [[row[key] for key in columns.values()] for row in rows]
    print(results.table(list(columns), body))
    waiting = waiting_share(encoded, cores, 2 if arguments.tiny else 30)
    print(f"a training step waits for its images {100 * waiting:.1f}% of its time")
    size = float(np.mean([len(image) for image in encoded])) / 1e3
    results.write(
        arguments.output,
        {
            "machine": machine,
            "kilobytes_an_image": size,
            "waiting_share": waiting,
            "rows": rows,
        },
    )


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
        encoded.append(
            cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[
                1
            ].tobytes()
        )
    return encoded


def waiting_share(encoded: Sequence[bytes], cores: int, steps: int) -> float:
    """Trains some steps from the pipeline; returns the share of the time waited."""
    batches = _batches(encoded, 64, cores)
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
    return waited / total


def _batches(encoded: Sequence[bytes], image_size: int, threads: int) -> Any:
    return training_batches(
        MemorySplit(encoded, image_size),
        range(1 << 30),
        seed=0,
        batch_size=min(BATCH, len(encoded)),
        shuffle="examples",
        threads=threads,
        undecodable=UndecodableImages(0),
    )


def _decode(encoded: bytes) -> None:
    cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR)


class _TensorFlow:
    """tf.data in another Python."""

    def __init__(self, python: str, folder: str) -> None:
        script = Path(__file__).with_name("tensorflow_input.py")
        self._process = subprocess.Popen(
            [python, str(script), folder, "224", str(BATCH)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def seconds(self, count: int) -> float:
        """Makes so many batches."""
        assert self._process.stdin
        assert self._process.stdout
        print(count, file=self._process.stdin, flush=True)
        return float(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()


def _against(
    calls: dict[str, Callable[[int], Any]], other: _TensorFlow, count: int, rounds: int
) -> dict[str, measuring.Timing]:
    ours = next(iter(calls.values()))
    other.seconds(count)
    pairs = [
        (measuring.elapsed(ours, turn), 1e3 * other.seconds(count))
        for turn in range(rounds)
    ]
    mine, theirs = np.array(pairs).T
    return {"tf.data": measuring.timing(theirs, mine)}


if __name__ == "__main__":
    given = results.parse(
        __doc__, "input", tensorflow_python="a Python that has TensorFlow"
    )
    measuring.prepare(given.cores)
    main(given)
