"""The pipeline of `tf.data`, started by `benchmarks.input` in another Python.

It needs TensorFlow and nothing else. For every line on standard input it makes the
given number of batches and answers with the seconds they took.
"""

import sys
import time
from pathlib import Path

import tensorflow as tf


def main(folder: str, image_size: int, batch: int, cores: int) -> None:
    """Answers until its input ends."""
    files = [str(path) for path in sorted(Path(folder).glob("*.jpeg"))]
    encoded = [Path(file).read_bytes() for file in files]

    def crop(image: tf.Tensor) -> tf.Tensor:
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            tf.io.extract_jpeg_shape(image),
            tf.zeros((1, 0, 4)),
            area_range=(0.08, 1.0),
            aspect_ratio_range=(3 / 4, 4 / 3),
            max_attempts=10,
            use_image_if_no_bounding_boxes=True,
        )
        top, left, _ = tf.unstack(begin)
        height, width, _ = tf.unstack(size)
        part = tf.io.decode_and_crop_jpeg(
            image, tf.stack([top, left, height, width]), channels=3
        )
        resized = tf.image.resize(part, (image_size, image_size))
        return tf.cast(tf.image.random_flip_left_right(resized), tf.uint8)

    images = tf.data.Dataset.from_tensor_slices(encoded).shuffle(len(encoded)).repeat()
    images = images.map(crop, num_parallel_calls=cores).batch(batch)
    options = tf.data.Options()
    options.threading.private_threadpool_size = cores
    batches = iter(images.with_options(options).prefetch(2))
    for line in sys.stdin:
        begin = time.perf_counter()
        for _ in range(int(line)):
            next(batches)
        print(time.perf_counter() - begin, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
