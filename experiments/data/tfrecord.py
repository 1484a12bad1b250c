"""Reads and writes TFRECORD files without TensorFlow.

A record is framed as the length of its data (8 bytes), a masked CRC-32C of these 8
bytes (4 bytes), the data, and a masked CRC-32C of the data (4 bytes). All numbers are
little-endian.
"""

import struct
from collections.abc import Iterator
from typing import IO

import google_crc32c
import numpy as np
from etils import epath

from experiments.data.errors import DataError
from experiments.data.files import file_status
from experiments.data.splits import UndecodableError

_HEADER = struct.Struct("<QI")  # length of the data, masked checksum of the length
_FOOTER = struct.Struct("<I")  # masked checksum of the data
_LENGTH_BYTES = 8


class _DamagedError(ValueError):
    """What is wrong with a record, before it's known where it lies."""


def read_records(path: epath.PathLike) -> Iterator[bytes]:
    """Yields the records of a TFRECORD file, with every checksum checked.

    Args:
      path: a local path, or any other that `etils.epath` opens, such as a bucket's.

    Yields:
      The data of each record, in the order of the file.

    Raises:
      DataError: if the file ends within a record or a checksum does not match.
      FileNotFoundError: if there is no such file.
    """
    left = file_status(path).size
    with epath.Path(path).open("rb") as file:
        number = 0
        while left:
            try:
                record = _read_record(file, left)
            except _DamagedError as error:
                raise DataError(_describe(path, number, error)) from None
            yield record
            left -= framed_size(len(record))
            number += 1


def find_offsets(path: epath.PathLike) -> np.ndarray:
    """Finds where each record of a file starts, without reading their data.

    Args:
      path: as in `read_records`.

    Returns:
      int64 (records + 1,): the first byte of each record's frame, and the file's size.

    Raises:
      DataError: if the file ends within a record, or a length's checksum does not
        match. The checksums of the data are not looked at.
      FileNotFoundError: if there is no such file.
    """
    size = file_status(path).size
    offsets = [0]
    with epath.Path(path).open("rb") as file:
        try:
            while (start := offsets[-1]) < size:
                file.seek(start)
                length = _read_length(file, size - start)
                offsets.append(start + framed_size(length))
        except _DamagedError as error:
            raise DataError(_describe(path, len(offsets) - 1, error)) from None
    return np.array(offsets, np.int64)


def read_record_at(path: epath.PathLike, start: int, end: int) -> bytes:
    """Reads one record, with its checksums checked.

    Args:
      path: as in `read_records`.
      start: the first byte of the record's frame.
      end: the first byte after it.

    Raises:
      UndecodableError: if the record is damaged; the message says how, not where.
      DataError: if a sound record is there that ends elsewhere: the places are wrong.
      FileNotFoundError: if there is no such file.
    """
    with epath.Path(path).open("rb") as file:
        file.seek(start)
        try:
            record = _read_record(file, end - start)
        except _DamagedError as error:
            raise UndecodableError(str(error)) from None
    if framed_size(len(record)) != end - start:
        raise DataError(
            f"TFRECORD file {path} has a record from byte {start} to "
            f"{start + framed_size(len(record))}, where its index says {end}: the file "
            "or the index was changed; start again after removing the index, a file of "
            "the folder bn_jax/tfrecord_index in ~/.cache or $XDG_CACHE_HOME"
        )
    return record


def framed_size(length: int) -> int:
    """The bytes that a record of so many takes in a file."""
    return _HEADER.size + length + _FOOTER.size


def frame(record: bytes) -> bytes:
    """Returns a record as it stands in a file."""
    length = _HEADER.pack(len(record), 0)[:_LENGTH_BYTES]
    header = _HEADER.pack(len(record), _masked_crc32c(length))
    return header + record + _FOOTER.pack(_masked_crc32c(record))


def _read_length(file: IO[bytes], left: int) -> int:
    """Returns the length of the next record's data, in a file of so many bytes more."""
    header = file.read(_HEADER.size)
    if len(header) < _HEADER.size:
        raise _DamagedError("the file ends within its length")
    length: int
    length, checksum = _HEADER.unpack(header)
    if _masked_crc32c(header[:_LENGTH_BYTES]) != checksum:
        raise _DamagedError("the checksum of its length is wrong")
    # Whatever the checksum, a wrong length could ask for any amount of memory.
    if framed_size(length) > left:
        raise _ends_within(length)
    return length


def _read_record(file: IO[bytes], left: int) -> bytes:
    """Returns the data of the next record, in a file of so many bytes more."""
    length = _read_length(file, left)
    data = file.read(length)
    footer = file.read(_FOOTER.size)
    if len(data) < length or len(footer) < _FOOTER.size:
        raise _ends_within(length)
    if _masked_crc32c(data) != _FOOTER.unpack(footer)[0]:
        raise _DamagedError("the checksum of its data is wrong")
    return data


def _masked_crc32c(data: bytes) -> int:
    """Returns the CRC-32C, rotated and shifted as TFRECORD stores it."""
    crc: int = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def _ends_within(length: int) -> _DamagedError:
    return _DamagedError(f"the file ends within its {length} bytes")


def _describe(path: epath.PathLike, number: int, problem: _DamagedError) -> str:
    return (
        f"TFRECORD file {path} is truncated or corrupted: in record {number} (from 0) "
        f"{problem}; copy the file again, or prepare its data set again"
    )
