"""TFRECORD files and their index with changes: the right records, or one line."""

import hashlib
import os
import random
import struct
from collections import Counter

import google_crc32c
import numpy as np
import pytest

from experiments.data.errors import DataError
from experiments.data.records import Records, read_file
from experiments.data.splits import UndecodableError
from tests.experiments.data.prepared_sets import frame_tfrecord

CONTENTS = [bytes([number]) * (3 + 5 * number) for number in range(12)]
LENGTHS = (5, 7)
NUM_CHANGES = 1000


def masked(data):
    crc = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32)


@pytest.fixture
def paths(tmp_path):
    paths = [tmp_path / f"split.tfrecord-{number}" for number in range(2)]
    for path, part in zip(paths, (CONTENTS[:5], CONTENTS[5:]), strict=True):
        path.write_bytes(frame_tfrecord(part))
        os.utime(path, (1, 1))
    return paths


def read_each(paths):
    """What each record is: itself, or that it cannot be read."""
    records = Records(paths, LENGTHS, "tfrecord")
    for index in range(len(records)):
        try:
            yield records[index]
        except UndecodableError:
            yield None


def assert_right(found):
    pairs = zip(found, CONTENTS, strict=True)
    assert not [number for number, (a, b) in enumerate(pairs) if a not in (None, b)]


@pytest.mark.parametrize("length", [2**31, 2**62, 2**63, 2**64 - 1])
def test_a_length_that_no_file_has(paths, length):
    """With the checksum that belongs to it."""
    field = struct.pack("<Q", length)
    content = paths[1].read_bytes()
    paths[1].write_bytes(field + masked(field) + content[12:])
    for read in (lambda: list(read_each(paths)), lambda: read_all(paths[1])):
        with pytest.raises(DataError, match=f"ends within its {length} bytes"):
            read()


def read_all(path):
    from etils import epath

    return read_file(epath.Path(path), LENGTHS[1], "tfrecord")


def test_any_change_of_a_file(paths):
    chance = random.Random(0)
    sound = [path.read_bytes() for path in paths]
    counts = Counter()
    for time in range(NUM_CHANGES):
        number = chance.randrange(2)
        content = bytearray(sound[number])
        start, end = sorted(chance.sample(range(len(content)), 2))
        kind = chance.randrange(4)
        if kind == 0:
            content[start] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del content[start:end]
        elif kind == 2:
            content[start:start] = content[start:end]
        else:
            place = content.index(chance.choice(CONTENTS[5 * number : 5 + 7 * number]))
            field = struct.pack("<Q", chance.randrange(2**64))
            content[place - 12 : place] = field + masked(field)
        paths[number].write_bytes(content)
        os.utime(paths[number], (time, time))  # more often than clocks tell
        try:
            found = list(read_each(paths))
        except DataError:
            counts["refused"] += 1
        else:
            assert_right(found)
            counts["read"] += 1
        paths[number].write_bytes(sound[number])
    assert counts.total() == NUM_CHANGES
    assert min(counts.values()) > NUM_CHANGES / 20


def kept_index(cache_dir):
    (path,) = (cache_dir / "bn_jax" / "tfrecord_index").iterdir()
    return path


def forge(path, offsets):
    """An index of the same files with the digest that belongs to it."""
    data = np.array(offsets, "<i8").tobytes()
    identity = bytes.fromhex(path.name)
    path.write_bytes(hashlib.sha256(identity + data).digest() + data)


def test_a_forged_index(paths, cache_dir):
    """Its records are the right ones, or reading them ends with the first wrong one."""
    assert list(read_each(paths)) == CONTENTS
    path = kept_index(cache_dir)
    sound = np.frombuffer(path.read_bytes()[32:], "<i8")
    chance = random.Random(0)
    counts = Counter()
    for _ in range(NUM_CHANGES):
        offsets = sound.tolist()
        kind = chance.randrange(4)
        place, other = sorted(chance.sample(range(len(offsets)), 2))
        if kind == 0:
            offsets[place], offsets[other] = offsets[other], offsets[place]
        elif kind == 1:
            offsets[place] = chance.choice([0, -1, 2**62, chance.randrange(400)])
        elif kind == 2:  # two records as one, and one as two
            offsets.insert(other, offsets[other - 1] + chance.randrange(1, 40))
            del offsets[place]
        else:
            chance.shuffle(offsets)
        forge(path, offsets)
        try:
            found = list(read_each(paths))
        except DataError as error:
            refused = str(error)
        else:
            assert_right(found)
            counts["read"] += 1
            continue
        assert "its index says" in refused
        assert "tfrecord_index" in refused
        counts["refused"] += 1
    assert counts.total() == NUM_CHANGES
    assert min(counts.values()) > 0


@pytest.mark.parametrize("change", ["other files", "writable", "link", "pipe", "huge"])
def test_an_index_that_was_not_kept_here(paths, cache_dir, tmp_path, change):
    """It is not even read, and found anew."""
    assert list(read_each(paths)) == CONTENTS
    path = kept_index(cache_dir)
    data = path.read_bytes()[32:]
    path.unlink()
    if change == "other files":
        path.write_bytes(hashlib.sha256(data).digest() + data)
    elif change == "writable":
        forge(path, [0, *range(20, 24), 400, 0, *range(20, 26), 800])
        path.chmod(0o666)
    elif change == "link":
        forge(tmp_path / path.name, [0] * 14)
        path.symlink_to(tmp_path / path.name)
    elif change == "pipe":
        os.mkfifo(path)
    else:
        with path.open("wb") as file:
            file.truncate(2**40)
    assert list(read_each(paths)) == CONTENTS
    assert not path.is_symlink()
    assert path.read_bytes()[32:] == data
