"""Where each record of a split's TFRECORD files starts, remembered between runs."""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from etils import epath

from experiments.data.files import map_files
from experiments.data.tfrecord import find_offsets

_DIGEST_BYTES = hashlib.sha256().digest_size


def load_offsets(paths: Sequence[epath.Path]) -> list[np.ndarray]:
    """Finds the records of TFRECORD files, or recalls where they were found before.

    Finding them reads the header of every record, which for large sets on slow disks
    takes minutes. What was found is kept in the user's cache directory, for as long as
    the files have the same sizes and modification times; where it cannot be kept, or is
    damaged, it is found anew.

    Args:
      paths: the files.

    Returns:
      For each file int64 (records + 1,), as `tfrecord.find_offsets` gives it.

    Raises:
      DataError: if a file is missing, truncated or corrupted.
    """
    stats = map_files(lambda path: path.stat(), paths)
    files = [
        (os.fspath(path), stat.length, stat.mtime)
        for path, stat in zip(paths, stats, strict=True)
    ]
    name = hashlib.sha256(repr(files).encode()).hexdigest()
    # A cache that cannot be had, for whatever reason, is no reason to stop.
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        return _recall(_cache_directory() / name)
    offsets = map_files(find_offsets, paths)
    with contextlib.suppress(OSError, RuntimeError):
        _keep(_cache_directory() / name, offsets)
    return offsets


def _cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(base) / "bn_jax" / "tfrecord_index"


def _recall(path: Path) -> list[np.ndarray]:
    content = path.read_bytes()
    digest, data = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    if hashlib.sha256(data).digest() != digest:
        raise ValueError("the cached index is damaged")
    offsets = np.frombuffer(data, "<i8")
    # Every file's first offset is 0, and no other is.
    return np.split(offsets, np.flatnonzero(offsets == 0)[1:])


def _keep(path: Path, offsets: Sequence[np.ndarray]) -> None:
    """Writes the file whole, whatever other processes write at the same time."""
    data = np.concatenate(offsets).astype("<i8").tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(hashlib.sha256(data).digest() + data)
    os.replace(file.name, path)
