"""Reads the MNIST files that come with the project."""

import gzip
import hashlib
from pathlib import Path

import numpy as np

from experiments.data.errors import DataError
from experiments.data.image_set import ImageSet

BUNDLED_DIRECTORY = Path(__file__).parent / "mnist"

SHA256 = {
    "train-images-idx3-ubyte.gz": (
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"
    ),
    "train-labels-idx1-ubyte.gz": (
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"
    ),
    "t10k-images-idx3-ubyte.gz": (
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"
    ),
    "t10k-labels-idx1-ubyte.gz": (
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"
    ),
}


def load_bundled_mnist(directory: Path = BUNDLED_DIRECTORY) -> ImageSet:
    """Reads the four official MNIST files.

    Args:
      directory: where the files are.

    Returns:
      60000 training and 10000 test images, uint8 (examples, 28, 28, 1), and their
      labels, int32 (examples,) from 0 to 9.

    Raises:
      DataError: if a file is missing, or is not bit for bit the official one.
    """
    train_images, train_labels, test_images, test_labels = (
        _read_idx(directory / name, sha256) for name, sha256 in SHA256.items()
    )
    return ImageSet(
        train_images=train_images[..., np.newaxis],
        train_labels=train_labels.astype(np.int32),
        test_images=test_images[..., np.newaxis],
        test_labels=test_labels.astype(np.int32),
        num_classes=10,
    )


def _read_idx(path: Path, sha256: str) -> np.ndarray:
    """Returns the uint8 array of a gzipped IDX file whose SHA-256 is `sha256`."""
    remedy = "restore the file from the repository or install the project again"
    try:
        compressed = path.read_bytes()
    except FileNotFoundError:
        raise DataError(
            f"MNIST file {path} is missing: expected the official file; {remedy}"
        ) from None
    found = hashlib.sha256(compressed).hexdigest()
    if found != sha256:
        raise DataError(
            f"MNIST file {path} is truncated or corrupted: the SHA-256 of its "
            f"{len(compressed)} bytes is {found}, expected {sha256}; {remedy}"
        )
    # The checksum vouches for the content. IDX: two zero bytes, the element type
    # (8: uint8), the rank, each dimension as a big-endian uint32, the elements.
    content = gzip.decompress(compressed)
    rank = content[3]
    shape = np.frombuffer(content, ">u4", count=rank, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)
