import base64

import pytest

from experiments.data.errors import DataError
from experiments.data.tfrecord import read_records

RECORDS = [b"first", b"", bytes(range(256)) * 3, b"last"]


@pytest.fixture
def path(tmp_path, frame):
    path = tmp_path / "some.tfrecord-00000-of-00001"
    path.write_bytes(frame(RECORDS))
    return path


def test_reads_back_the_records(path):
    assert list(read_records(path)) == RECORDS
    assert list(read_records(str(path))) == RECORDS


def test_reads_what_another_writer_wrote(path):
    # The record b"foo" as TensorFlow, Apache Beam and tensorboardX write it.
    path.write_bytes(base64.b64decode("AwAAAAAAAACwmUkOZm9vYYq+/g=="))
    assert list(read_records(path)) == [b"foo"]


def test_empty_file_has_no_records(path):
    path.write_bytes(b"")
    assert list(read_records(path)) == []


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.tfrecord"):
        list(read_records(tmp_path / "none.tfrecord"))


def test_truncation_anywhere_is_an_error_in_the_right_record(path, frame):
    content = path.read_bytes()
    ends = [len(frame(RECORDS[:count])) for count in range(len(RECORDS) + 1)]
    for size in range(len(content)):
        path.write_bytes(content[:size])
        complete = sum(end <= size for end in ends[1:])
        if size == ends[complete]:
            # Nothing in the file tells: its data set's metadata has the count.
            assert list(read_records(path)) == RECORDS[:complete]
            continue
        found = []
        expected = f"{path} is truncated.* in record {complete} .* file ends"
        with pytest.raises(DataError, match=expected):
            found.extend(read_records(path))
        assert found == RECORDS[:complete]


def test_every_flipped_bit_is_an_error(path):
    content = path.read_bytes()
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"corrupted: in record \d .* is wrong"):
            list(read_records(path))


def test_error_is_one_line_that_says_what_to_do(path):
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="prepare its data set again") as caught:
        list(read_records(path))
    assert "\n" not in str(caught.value)
