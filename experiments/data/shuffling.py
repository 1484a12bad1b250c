"""Shuffles more records than memory holds, by writing them to disk once."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from experiments.data.errors import DataError
from experiments.data.tfrecord import frame, read_records

# A 256th of the records, and what waits to be written, must fit in memory.
_NUM_BUCKETS = 256
_BYTES_UNTIL_WRITTEN = 256 * 2**20

KEY_BYTES = 16


class Distributed(NamedTuple):
    """How much was written."""

    num_records: int
    num_bytes: int  # of the records, without keys


def distribute(records: Iterable[tuple[bytes, bytes]], directory: Path) -> Distributed:
    """Writes records to files, by the first byte of their key.

    Args:
      records: pairs of a key of `KEY_BYTES`, spread evenly over all values as a hash
        is, and the record.
      directory: an empty directory.
    """
    waiting: list[list[bytes]] = [[] for _ in range(_NUM_BUCKETS)]
    num_records = num_bytes = num_waiting_bytes = 0
    for key, record in records:
        waiting[key[0]].append(frame(key + record))
        num_records += 1
        num_bytes += len(record)
        num_waiting_bytes += len(record)
        if num_waiting_bytes > _BYTES_UNTIL_WRITTEN:
            _append(waiting, directory)
            num_waiting_bytes = 0
    _append(waiting, directory)
    return Distributed(num_records, num_bytes)


def collect(directory: Path, num_records: int) -> Iterator[bytes]:
    """Yields the records that `distribute` wrote, ordered by key, and deletes them.

    Each file goes when it has been read, so that what the caller writes meanwhile
    takes little space in addition; the directory goes with the last.

    Args:
      directory: the one that `distribute` wrote to.
      num_records: how many it wrote.

    Raises:
      DataError: if a file was damaged meanwhile, or records were added or taken away;
        or if two have the same key.
    """
    paths = sorted(directory.iterdir())
    last_key, left = b"", num_records
    for path in paths:
        records = sorted(read_records(path))
        left -= len(records)
        path.unlink()
        if path == paths[-1]:
            directory.rmdir()
            if left:
                raise DataError(
                    f"the temporary files in {directory} hold {num_records - left:,} "
                    f"records, not the {num_records:,} that were written; start again"
                )
        for record in records:
            key = record[:KEY_BYTES]
            if key == last_key:
                raise DataError("two records have the same key: expected one of each")
            last_key = key
            yield record[KEY_BYTES:]


def _append(waiting: list[list[bytes]], directory: Path) -> None:
    """Writes one file after the other: disks like it better than many at once."""
    for number, frames in enumerate(waiting):
        if frames:
            with (directory / f"{number:03}").open("ab") as file:
                file.writelines(frames)
            frames.clear()
