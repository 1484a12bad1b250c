import hashlib

import pytest

from experiments.data import shuffling
from experiments.data.errors import DataError
from experiments.data.shuffling import collect, distribute

RECORDS = [f"record {number}".encode() * (number % 5) for number in range(500)]


def keyed(records):
    return [
        (hashlib.md5(f"{number}".encode()).digest(), record)
        for number, record in enumerate(records)
    ]


@pytest.mark.parametrize("bytes_until_written", [0, 1000, 10**9])
def test_records_come_in_the_order_of_their_keys(
    tmp_path, monkeypatch, bytes_until_written
):
    monkeypatch.setattr(shuffling, "_BYTES_UNTIL_WRITTEN", bytes_until_written)
    directory = tmp_path / "unsorted"
    directory.mkdir()
    written = distribute(iter(keyed(RECORDS)), directory)
    assert written == (500, sum(map(len, RECORDS)))
    assert list(collect(directory, 500)) == [
        record for _, record in sorted(keyed(RECORDS), key=lambda pair: pair[0])
    ]
    assert not directory.exists()


def test_files_go_as_they_are_read(tmp_path):
    distribute(keyed(RECORDS), tmp_path)
    total = len(list(tmp_path.iterdir()))
    assert total > 200
    found = collect(tmp_path, 500)
    for _ in range(250):
        next(found)
    left = len(list(tmp_path.iterdir()))
    assert 0.4 * total < left < 0.6 * total


def test_nothing_to_shuffle(tmp_path):
    assert distribute([], tmp_path) == (0, 0)
    assert list(collect(tmp_path, 0)) == []


def test_damage_on_the_disk_is_noticed(tmp_path):
    distribute(keyed(RECORDS), tmp_path)
    path = sorted(tmp_path.iterdir())[3]
    content = bytearray(path.read_bytes())
    content[20] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=str(path)):
        list(collect(tmp_path, 500))
