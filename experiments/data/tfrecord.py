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
    with epath.Path(path).open("rb") as file:
        number = 0
        while True:
            try:
                record = _read_record(file)
            except _DamagedError as error:
                raise DataError(_describe(path, number, error)) from None
            if record is None:
                return
            yield record
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
    path = epath.Path(path)
    size = path.stat().length
    offsets = [0]
    with path.open("rb") as file:
        try:
            while (length := _read_length(file)) is not None:
                end = offsets[-1] + _HEADER.size + length + _FOOTER.size
                if end > size:
                    raise _ends_within(length)
                offsets.append(end)
                file.seek(end)
        except _DamagedError as error:
            raise DataError(_describe(path, len(offsets) - 1, error)) from None
    return np.array(offsets, np.int64)


def read_record_at(path: epath.PathLike, offset: int) -> bytes:
    """Reads one record, with its checksums checked.

    Args:
      path: as in `read_records`.
      offset: the first byte of the record's frame.

    Raises:
      UndecodableError: if the record is damaged; the message says how, not where.
      FileNotFoundError: if there is no such file.
    """
    with epath.Path(path).open("rb") as file:
        file.seek(offset)
        try:
            record = _read_record(file)
            if record is None:
                raise _DamagedError("the file ends before it")
        except _DamagedError as error:
            raise UndecodableError(str(error)) from None
    return record


def frame(record: bytes) -> bytes:
    """Returns a record as it stands in a file."""
    length = _HEADER.pack(len(record), 0)[:_LENGTH_BYTES]
    header = _HEADER.pack(len(record), _masked_crc32c(length))
    return header + record + _FOOTER.pack(_masked_crc32c(record))


def _read_length(file: IO[bytes]) -> int | None:
    """Returns the length of the next record's data, or None at the file's end."""
    header = file.read(_HEADER.size)
    if not header:
        return None
    if len(header) < _HEADER.size:
        raise _DamagedError("the file ends within its length")
    length: int
    length, checksum = _HEADER.unpack(header)
    # A wrong length could ask for any amount of memory.
    if _masked_crc32c(header[:_LENGTH_BYTES]) != checksum:
        raise _DamagedError("the checksum of its length is wrong")
    return length


def _read_record(file: IO[bytes]) -> bytes | None:
    """Returns the data of the next record, or None at the file's end."""
    length = _read_length(file)
    if length is None:
        return None
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
