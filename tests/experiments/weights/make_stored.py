"""Made stored/older.ckpt and stored/newer.ckpt.*, with TensorFlow 2.21.

python tests/experiments/weights/make_stored.py FOLDER
"""

import sys
from pathlib import Path

import numpy as np

# Longer than a block of a table, shorter, and without axes.
VARIABLES = {
    "InceptionV2/Conv2d_2b_1x1/weights": (np.float32, (1, 1, 25, 44)),
    "InceptionV2/Conv2d_2b_1x1/BatchNorm/beta": (np.float32, (5,)),
    "InceptionV2/Conv2d_2b_1x1/BatchNorm/moving_mean": (np.float32, (5,)),
    "InceptionV2/Conv2d_2c_3x3/weights": (np.float64, (3, 2, 4)),
    "counts": (np.int32, (3,)),
    "global_step": (np.int64, ()),
    "scalar": (np.float32, ()),
}


def values() -> dict[str, np.ndarray]:
    """What the variables hold; integers are of both signs and of many bytes."""
    random = np.random.default_rng(0)
    return {
        name: (random.normal(size=shape) * 1e5).astype(dtype)
        for name, (dtype, shape) in VARIABLES.items()
    }


def main(folder: Path) -> None:
    """Writes both forms of a checkpoint."""
    import tensorflow as tf

    v1 = tf.compat.v1
    v1.disable_eager_execution()
    with v1.Session() as session:
        for name, value in values().items():
            v1.Variable(value, name=name)
        session.run(v1.global_variables_initializer())
        for file, version in (("older.ckpt", 1), ("newer.ckpt", 2)):
            v1.train.Saver(write_version=version).save(
                session, str(folder / file), write_meta_graph=False, write_state=False
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
