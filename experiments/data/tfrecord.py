"""Reads TFRECORD files without TensorFlow."""

import struct
from collections.abc import Iterator

import google_crc32c
from etils import epath

from experiments.data.errors import DataError

_HEADER = struct.Struct("<QI")  # length of the data, masked checksum of the length
_FOOTER = struct.Struct("<I")  # masked checksum of the data
_LENGTH_BYTES = 8


def read_records(path: epath.PathLike) -> Iterator[bytes]:
    """Yields the records of a TFRECORD file, with every checksum checked.

    A record is framed as the length of its data (8 bytes), a masked CRC-32C of these
    8 bytes (4 bytes), the data, and a masked CRC-32C of the data (4 bytes). All
    numbers are little-endian.

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
        while header := file.read(_HEADER.size):
            if len(header) < _HEADER.size:
                raise _damaged(path, number, "the file ends within its length")
            length, length_checksum = _HEADER.unpack(header)
            # Checked first: a wrong length could ask for any amount of memory.
            if _masked_crc32c(header[:_LENGTH_BYTES]) != length_checksum:
                raise _damaged(path, number, "the checksum of its length is wrong")
            data = file.read(length)
            footer = file.read(_FOOTER.size)
            if len(data) < length or len(footer) < _FOOTER.size:
                raise _damaged(path, number, f"the file ends within its {length} bytes")
            if _masked_crc32c(data) != _FOOTER.unpack(footer)[0]:
                raise _damaged(path, number, "the checksum of its data is wrong")
            yield data
            number += 1


def _masked_crc32c(data: bytes) -> int:
    """Returns the CRC-32C, rotated and shifted as TFRECORD stores it."""
    crc: int = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def _damaged(path: epath.PathLike, number: int, problem: str) -> DataError:
    return DataError(
        f"TFRECORD file {path} is truncated or corrupted: in record {number} (from 0) "
        f"{problem}; copy the file again, or prepare its data set again"
    )
