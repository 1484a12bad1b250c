import gzip
import hashlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from experiments.data.bundled_mnist import (
    BUNDLED_DIRECTORY,
    SHA256,
    load_bundled_mnist,
)
from experiments.data.errors import DataError


@pytest.fixture
def directory(tmp_path):
    return shutil.copytree(BUNDLED_DIRECTORY, tmp_path / "mnist")


def test_content():
    mnist = load_bundled_mnist()
    assert mnist.num_classes == 10
    assert mnist.train_images.shape == (60000, 28, 28, 1)
    assert mnist.test_images.shape == (10000, 28, 28, 1)
    assert mnist.train_labels.shape == (60000,)
    assert mnist.test_labels.shape == (10000,)
    assert mnist.train_images.dtype == mnist.test_images.dtype == np.uint8
    assert mnist.train_labels.dtype == mnist.test_labels.dtype == np.int32
    # The labels that everyone knows, how often each occurs, and the mean pixel.
    assert mnist.train_labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert mnist.test_labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert np.bincount(mnist.test_labels).tolist() == [
        980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009,
    ]  # fmt: skip
    assert mnist.train_images.mean() / 255 == pytest.approx(0.1307, abs=5e-5)


def test_pixels_are_in_place():
    content = gzip.decompress(
        (BUNDLED_DIRECTORY / "t10k-images-idx3-ubyte.gz").read_bytes()
    )
    assert load_bundled_mnist().test_images.tobytes() == content[16:]


def test_readme_lists_the_sums():
    readme = (BUNDLED_DIRECTORY / "README.md").read_text()
    for name, sha256 in SHA256.items():
        assert f"| `{name}` | `{sha256}` |" in readme


@pytest.mark.parametrize("name", SHA256)
def test_missing_file(directory, name):
    (directory / name).unlink()
    with pytest.raises(DataError, match=f"{directory / name} is missing.* restore"):
        load_bundled_mnist(directory)


@pytest.mark.parametrize("name", SHA256)
@pytest.mark.parametrize("fraction", [0, 0.3, 0.999])
def test_truncated_file(directory, name, fraction):
    content = (directory / name).read_bytes()[: int(fraction * 4000)]
    (directory / name).write_bytes(content)
    with pytest.raises(
        DataError, match=f"{directory / name} is truncated.*{len(content)} bytes"
    ) as caught:
        load_bundled_mnist(directory)
    assert "restore the file" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("position", [0, 9, 2000, -5, -1])
def test_flipped_bit(directory, position):
    path = directory / "t10k-labels-idx1-ubyte.gz"
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)
    found = hashlib.sha256(content).hexdigest()
    with pytest.raises(
        DataError, match=f"{path}.*corrupted.*{found}, expected {SHA256[path.name]}"
    ):
        load_bundled_mnist(directory)


def test_needs_no_tensorflow_datasets():
    code = (
        "import sys; sys.modules['tensorflow_datasets'] = None;"
        "from experiments.data.image_set import load_image_set;"
        "load_image_set('mnist')"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
