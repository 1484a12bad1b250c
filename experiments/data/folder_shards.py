"""Writes files of records from image files, and notes what each file holds."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2

from experiments.data.conversion import WRITER_OPTIONS
from experiments.data.decoding import decode, image_size
from experiments.data.errors import printable
from experiments.data.image_folders import ImageFile
from experiments.data.splits import UndecodableError
from experiments.running.new_files import whole_file

_BYTES_PER_SHARD = 128 * 2**20
_MAX_IMAGE_BYTES = 2**26  # photographs take a fraction


class Shard(NamedTuple):
    """One file of records that is to be written."""

    path: Path
    images: list[ImageFile]


class Written(NamedTuple):
    """What became of the images of a shard; lists are in their order."""

    digests: list[str]  # of their bytes, hexadecimal; empty where one was not readable
    unreadable: dict[str, str]  # why, by name
    sizes: list[list[int]]  # the different heights and widths, at most two of them
    num_bytes: int

    @property
    def length(self) -> int:
        """How many records there are."""
        return len(self.digests) - len(self.unreadable)


def divide(split: str, images: Sequence[ImageFile], directory: Path) -> list[Shard]:
    """Shares the images of a split out, in the order of a hash of their names."""

    def key(image: ImageFile) -> bytes:
        return hashlib.md5(split.encode() + os.fsencode(image.name)).digest()

    total = sum(image.num_bytes for image in images)
    num_shards = min(len(images), 1 + total // _BYTES_PER_SHARD)
    images = sorted(images, key=key)
    ends = [len(images) * number // num_shards for number in range(num_shards + 1)]
    return [
        Shard(directory / f"{split}-{number:05}", images[start:end])
        for number, (start, end) in enumerate(itertools.pairwise(ends))
    ]


def read_written(shard: Shard) -> Written | None:
    """What an earlier process has written of a shard; None if it is not whole."""
    try:
        return Written(**json.loads(_note(shard.path).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def write_shard(directory: Path, shard: Shard) -> Written:
    """Reads, tries and writes the images of a shard; the last thing is the note.

    Args:
      directory: the one of images.
      shard: what to write.
    """
    from array_record.python import array_record_module

    cv2.setNumThreads(0)  # every core has such a process
    digests, unreadable, sizes = [], {}, set()
    num_bytes = 0
    partial = shard.path.with_suffix(".partial")
    writer = array_record_module.ArrayRecordWriter(str(partial), WRITER_OPTIONS)
    for image in shard.images:
        try:
            content = _read(directory / image.name)
            sizes.add(image_size(content))
            decode(content, at_least=1)  # as small as it gets: whether, not what
        except (OSError, UndecodableError) as error:
            reason = error.strerror if isinstance(error, OSError) else None
            unreadable[printable(image.name)] = reason or str(error)
            digests.append("")
            continue
        writer.write(_example(content, image))
        digests.append(hashlib.sha256(content).hexdigest())
        num_bytes += len(content)
    writer.close()
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(shard.path)
    written = Written(digests, unreadable, sorted(map(list, sizes))[:2], num_bytes)
    with whole_file(_note(shard.path)) as note:
        note.write(json.dumps(written._asdict()).encode())
    return written


def _note(path: Path) -> Path:
    return path.with_suffix(".json")


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        content = file.read(_MAX_IMAGE_BYTES + 1)
    if len(content) > _MAX_IMAGE_BYTES:
        raise UndecodableError(f"it has more than {_MAX_IMAGE_BYTES:,} bytes")
    return content


def _example(content: bytes, image: ImageFile) -> bytes:
    from tensorflow_datasets.proto import tf_example_pb2

    example = tf_example_pb2.Example()
    fields = example.features.feature
    fields["image"].bytes_list.value.append(content)
    fields["label"].int64_list.value.append(image.label)
    fields["file_name"].bytes_list.value.append(printable(image.name).encode())
    record: bytes = example.SerializeToString()
    return record
