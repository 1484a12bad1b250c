"""Reads TensorFlow's checkpoints without TensorFlow.

Both forms are tables of sorted keys, as LevelDB has them. In the older one (MODEL.ckpt)
the table holds the tensors; in the newer one (MODEL.ckpt.index) it says where in the
files MODEL.ckpt.data-00000-of-00001 they lie.
"""

import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from experiments.weights.errors import WeightsError

MAGIC = 0xDB4775248B80FB57  # the last 8 bytes of a table
FOOTER_BYTES = 48
# Of the types that TensorFlow numbers, those that variables have.
DTYPES = {1: "<f4", 2: "<f8", 3: "<i4", 9: "<i8", 19: "<f2"}
INTEGERS = (3, 9)
VALUE_FIELDS = {1: 5, 2: 6, 3: 7, 9: 10}  # of a TensorProto, the one that has them
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types of protocol buffers


def index_of(path: Path) -> Path | None:
    """The file of the table, of a checkpoint that is named by either."""
    for candidate in (path, path.with_name(f"{path.name}.index")):
        if candidate.is_file():
            with candidate.open("rb") as file:
                file.seek(max(0, candidate.stat().st_size - 8))
                if file.read() == struct.pack("<Q", MAGIC):
                    return candidate
    return None


def read(path: Path) -> dict[str, np.ndarray]:
    """The variables of a checkpoint, by name.

    Raises:
      WeightsError: it is none, or holds what is not known here.
    """
    index = index_of(path)
    if index is None:
        raise WeightsError(
            "no checkpoint of TensorFlow is there: expected MODEL.ckpt, or "
            "MODEL.ckpt.index beside MODEL.ckpt.data-00000-of-00001."
        )
    entries = dict(_table(index.read_bytes()))
    header = entries.pop(b"")
    if index.suffix == ".index":
        return _from_bundle(index, header, entries)
    return _from_slices(header, entries)


def _from_bundle(
    index: Path, header: bytes, entries: dict[bytes, bytes]
) -> dict[str, np.ndarray]:
    num_shards = _fields(header).get(1, [1])[0]
    shards = [
        np.memmap(
            index.with_name(f"{index.stem}.data-{i:05}-of-{num_shards:05}"),
            np.uint8,
            "r",
        )
        for i in range(num_shards)
    ]
    arrays = {}
    for key, value in entries.items():
        name, entry = key.decode(), _fields(value)
        if entry[1][0] not in DTYPES:
            continue  # as of the graph of objects that Keras adds
        if 7 in entry:
            raise WeightsError(f"{name} is stored in slices, which are not read here.")
        shard, first, size = (entry.get(field, [0])[0] for field in (3, 4, 5))
        content = shards[shard][first : first + size].tobytes()
        if _masked_crc32c(content) != entry[6][0]:
            raise WeightsError(f"{name} differs from its checksum; fetch it again.")
        arrays[name] = _array(name, entry[1][0], _shape(entry[2][0]), content)
    return arrays


def _from_slices(header: bytes, entries: dict[bytes, bytes]) -> dict[str, np.ndarray]:
    described = map(_fields, _fields(_fields(header)[1][0])[1])
    variables = {of[1][0]: (_shape(of[2][0]), of[3][0]) for of in described}
    arrays: dict[str, np.ndarray] = {}
    for value in entries.values():
        part = _fields(_fields(value)[2][0])
        shape, dtype = variables[part[1][0]]
        name = part[1][0].decode()
        if name in arrays:
            raise WeightsError(f"{name} is stored in slices, which are not read here.")
        if dtype not in VALUE_FIELDS:
            continue
        values = b"".join(_fields(part[3][0]).get(VALUE_FIELDS[dtype], []))
        if dtype in INTEGERS:
            numbers = np.array(list(_varints(values)), np.uint64)
            values = numbers.astype(DTYPES[dtype]).tobytes()
        arrays[name] = _array(name, dtype, shape, values)
    return arrays


def _array(name: str, dtype: int, shape: tuple[int, ...], content: bytes) -> np.ndarray:
    values = np.frombuffer(content, DTYPES[dtype])
    if values.size != math.prod(shape):
        raise WeightsError(f"{name} has {values.size} values for its shape {shape}.")
    return values.reshape(shape)


def _shape(message: bytes) -> tuple[int, ...]:
    dimensions = _fields(message).get(2, [])
    return tuple(_fields(dimension).get(1, [0])[0] for dimension in dimensions)


def _table(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The keys and values of a table, in order."""
    footer = content[-FOOTER_BYTES:]
    *_, index_offset, index_size = _numbers(footer, 4)
    for _, handle in _block(content, index_offset, index_size):
        yield from _block(content, *_numbers(handle, 2))


def _block(content: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    block = content[offset : offset + size]
    compression, checksum = struct.unpack_from("<BI", content, offset + size)
    if _masked_crc32c(content[offset : offset + size + 1]) != checksum:
        raise WeightsError("a block differs from its checksum; fetch the file again.")
    if compression:
        raise WeightsError(
            "its table is compressed, which is not read here; load it in TensorFlow "
            "and save its variables by numpy.savez."
        )
    (num_restarts,) = struct.unpack_from("<I", block, size - 4)
    end, at, key = size - 4 * (num_restarts + 1), 0, b""
    while at < end:
        # Keys have their beginning from the one before.
        shared, at = _varint(block, at)
        unshared, at = _varint(block, at)
        length, at = _varint(block, at)
        key = key[:shared] + block[at : at + unshared]
        at += unshared
        yield key, block[at : at + length]
        at += length


def _fields(message: bytes) -> dict[int, list[Any]]:
    """The fields of a protocol buffer: numbers, or bytes, as often as they occur."""
    fields: dict[int, list[Any]] = {}
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        number, wire_type = tag >> 3, tag & 7
        value: Any
        if wire_type == VARINT:
            value, at = _varint(message, at)
        elif wire_type == BYTES:
            length, at = _varint(message, at)
            value, at = message[at : at + length], at + length
        elif wire_type in (FIXED32, FIXED64):
            form = "<I" if wire_type == FIXED32 else "<Q"
            (value,) = struct.unpack_from(form, message, at)
            at += struct.calcsize(form)
        else:
            raise WeightsError(f"it has a field of the unknown type {wire_type}.")
        fields.setdefault(number, []).append(value)
    return fields


def _varints(packed: bytes) -> Iterator[int]:
    at = 0
    while at < len(packed):
        value, at = _varint(packed, at)
        yield value


def _numbers(content: bytes, count: int) -> list[int]:
    numbers, at = [], 0
    for _ in range(count):
        value, at = _varint(content, at)
        numbers.append(value)
    return numbers


def _varint(content: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, the lowest first, and where it ends."""
    value = shift = 0
    while True:
        byte = content[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _masked_crc32c(content: bytes) -> int:
    # As in TFRecord files: that of data with its checksum is to be no constant.
    crc: int = google_crc32c.value(content)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
