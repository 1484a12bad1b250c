"""Where each record of a split's TFRECORD files starts, remembered between runs."""

import contextlib
import hashlib
import itertools
import os
import stat
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from etils import epath

from experiments.data.files import FileStatus, file_status, map_files
from experiments.data.tfrecord import find_offsets, framed_size

_DIGEST_BYTES = hashlib.sha256().digest_size


def load_offsets(
    paths: Sequence[epath.Path], lengths: Sequence[int]
) -> list[np.ndarray]:
    """Finds the records of TFRECORD files, or recalls where they were found before.

    Finding them reads the header of every record, which for large sets on slow disks
    takes minutes. What was found is kept in the user's cache directory, for as long as
    the files have the same sizes and modification times; where it cannot be kept, is
    damaged, or was written by somebody else, it is found anew.

    What is recalled divides each file, without gaps, into as many records as it is to
    hold. Whether it does so where the file does, the reader of a record sees, in the
    checksums of its length and its data.

    Args:
      paths: the files.
      lengths: how many records each file is to hold.

    Returns:
      For each file int64 (records + 1,), as `tfrecord.find_offsets` gives it.

    Raises:
      DataError: if a file is missing, truncated or corrupted.
    """
    status = map_files(file_status, paths)
    files = repr([(os.fspath(p), *s) for p, s in zip(paths, status, strict=True)])
    identity = hashlib.sha256(files.encode())
    # A cache that cannot be had, for whatever reason, is no reason to stop.
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        kept = _cache_directory() / identity.hexdigest()
        return _recall(kept, identity.digest(), status, lengths)
    offsets = map_files(find_offsets, paths)
    with contextlib.suppress(OSError, RuntimeError):
        _keep(_cache_directory() / identity.hexdigest(), identity.digest(), offsets)
    return offsets


def _cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(base) / "bn_jax" / "tfrecord_index"


def _recall(
    path: Path, identity: bytes, status: Sequence[FileStatus], lengths: Sequence[int]
) -> list[np.ndarray]:
    counts = [length + 1 for length in lengths]
    num_bytes = _DIGEST_BYTES + 8 * sum(counts)
    kept = path.lstat()
    writable_by_others = kept.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if (
        not stat.S_ISREG(kept.st_mode)
        or kept.st_size != num_bytes
        or kept.st_uid != os.geteuid()
        or writable_by_others
    ):
        raise ValueError("the cached index is not one that was kept here")
    content = path.read_bytes()
    digest, data = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    if hashlib.sha256(identity + data).digest() != digest:
        raise ValueError("the cached index is damaged, or of other files")
    ends = list(itertools.accumulate(counts))
    offsets = np.split(np.frombuffer(data, "<i8"), ends[:-1])
    for found, (size, _) in zip(offsets, status, strict=True):
        sound = found[0] == 0 and found[-1] == size
        if not sound or (np.diff(found) < framed_size(0)).any():
            raise ValueError("the cached index does not divide the files into records")
    return offsets


def _keep(path: Path, identity: bytes, offsets: Sequence[np.ndarray]) -> None:
    """Writes the file whole, whatever other processes write at the same time."""
    data = np.concatenate(offsets).astype("<i8").tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(hashlib.sha256(identity + data).digest() + data)
    os.replace(file.name, path)
