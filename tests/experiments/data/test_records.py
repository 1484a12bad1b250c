import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from etils import epath

from experiments.data import files, records, tfrecord_index
from experiments.data.errors import DataError
from experiments.data.records import Records, read_file
from experiments.data.splits import UndecodableError
from tests.experiments.data.prepared_sets import frame_tfrecord

LENGTHS = (5, 1, 4)
RECORDS = [
    np.random.default_rng(number).bytes(size)
    for number, size in enumerate([300, 0, 1, 2000, 70, 64, 5, 900, 11, 100_000])
]


def write_array_record(path, content):
    from array_record.python import array_record_module

    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for record in content:
        writer.write(record)
    writer.close()


def write_tfrecord(path, content):
    path.write_bytes(frame_tfrecord(content))


WRITE = {"array_record": write_array_record, "tfrecord": write_tfrecord}


@pytest.fixture(params=["array_record", "tfrecord"])
def file_format(request):
    return request.param


@pytest.fixture
def paths(tmp_path, file_format):
    paths = [tmp_path / f"split.{file_format}-{i}" for i in range(len(LENGTHS))]
    remaining = iter(RECORDS)
    for path, length in zip(paths, LENGTHS, strict=True):
        WRITE[file_format](path, [next(remaining) for _ in range(length)])
    return paths


@pytest.fixture
def tfrecords(tmp_path):
    paths = [tmp_path / f"split.tfrecord-{i}" for i in range(2)]
    write_tfrecord(paths[0], RECORDS[:5])
    write_tfrecord(paths[1], RECORDS[5:])
    return paths


def error_of(paths, lengths, file_format):
    with pytest.raises(DataError) as caught:
        Records(paths, lengths, file_format)
    message = str(caught.value)
    assert "\n" not in message
    assert "; " in message
    return message


def flip_bit(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_reads_every_record_in_any_order(paths, file_format):
    found = Records(paths, LENGTHS, file_format)
    assert len(found) == len(RECORDS)
    for index in np.random.default_rng(0).permutation(len(RECORDS)):
        assert found[int(index)] == RECORDS[index]


@pytest.mark.parametrize("index", [-1, len(RECORDS)])
def test_no_such_record(paths, file_format, index):
    with pytest.raises(IndexError):
        Records(paths, LENGTHS, file_format)[index]


def test_records_have_names(paths, file_format):
    found = Records(paths, LENGTHS, file_format)
    assert found.describe(0) == f"example 0 (from 0) of record file {paths[0]}"
    assert found.describe(5) == f"example 0 (from 0) of record file {paths[1]}"
    assert found.describe(9) == f"example 3 (from 0) of record file {paths[2]}"


def test_empty_file_among_others(tmp_path):
    paths = [tmp_path / name for name in "abc"]
    for path, content in zip(paths, (RECORDS[:2], [], RECORDS[2:4]), strict=True):
        write_tfrecord(path, content)
    found = Records(paths, (2, 0, 2), "tfrecord")
    assert [found[index] for index in range(4)] == RECORDS[:4]


def test_many_threads_at_once(paths, file_format, monkeypatch):
    # Readers are closed and opened again while others use them.
    monkeypatch.setattr(records, "_MAX_ARRAY_RECORD_READERS", 1)
    found = Records(paths, LENGTHS, file_format)
    order = np.random.default_rng(0).integers(len(RECORDS), size=2000)
    start = threading.Barrier(8)

    def read(part):
        start.wait()
        return all(found[int(i)] == RECORDS[i] for i in order[part::8])

    with ThreadPoolExecutor(8) as executor:
        assert all(executor.map(read, range(8)))


def test_array_record_files_stay_open(tmp_path, monkeypatch):
    path = tmp_path / "split.array_record"
    write_array_record(path, RECORDS)
    found = Records([path], [len(RECORDS)], "array_record")
    assert found[0] == RECORDS[0]
    path.unlink()
    assert found[1] == RECORDS[1]


def test_damaged_record_spoils_no_other(paths, file_format):
    content = paths[2].read_bytes()
    flip_bit(paths[2], content.index(RECORDS[9][:100]) + 500)
    found = Records(paths, LENGTHS, file_format)
    for _ in range(2):
        with pytest.raises(UndecodableError) as caught:
            found[9]
        assert "\n" not in str(caught.value)
        assert [found[index] for index in range(9)] == RECORDS[:9]


def test_missing_file(paths, file_format):
    paths[1].unlink()
    message = error_of(paths, LENGTHS, file_format)
    assert f"record file {paths[1]} is missing" in message
    with pytest.raises(DataError, match="is missing"):
        read_file(epath.Path(paths[1]), 1, file_format)


@pytest.mark.parametrize("fraction", [0, 0.3, 0.99])
def test_truncated_file(paths, file_format, fraction):
    content = paths[2].read_bytes()
    paths[2].write_bytes(content[: int(fraction * len(content))])
    message = error_of(paths, LENGTHS, file_format)
    # What an empty TFRECORD file lacks, only the metadata know.
    empty = fraction == 0 and file_format == "tfrecord"
    problem = "holds 0 examples: expected 4" if empty else "is truncated or corrupted"
    assert f"{paths[2]} {problem}" in message


@pytest.mark.parametrize("lengths", [(4, 2, 4), (5, 1, 5)])
def test_another_number_of_records(paths, file_format, lengths):
    message = error_of(paths, lengths, file_format)
    assert "examples: expected" in message
    assert "dataset_info.json" in message


def test_array_record_in_a_bucket_that_cannot_be_opened():
    error = records._damaged_array_record(
        epath.Path("gs://bucket/split.array_record"), RuntimeError("no credentials")
    )
    assert "gs://bucket/split.array_record cannot be opened" in str(error)
    assert "no credentials" in str(error)
    assert "gcsfuse" in str(error)


def test_damaged_length_is_noticed_at_once(tfrecords):
    flip_bit(tfrecords[1], 0)
    message = error_of(tfrecords, (5, 5), "tfrecord")
    assert f"{tfrecords[1]} is truncated or corrupted: in record 0" in message


def count_searches(monkeypatch):
    searched = []
    original = tfrecord_index.find_offsets

    def find_offsets(path):
        searched.append(str(path))
        return original(path)

    monkeypatch.setattr(tfrecord_index, "find_offsets", find_offsets)
    return searched


def test_index_is_remembered(tfrecords, cache_dir, monkeypatch):
    searched = count_searches(monkeypatch)
    for _ in range(2):
        found = Records(tfrecords, (5, 5), "tfrecord")
        assert [found[index] for index in range(10)] == RECORDS
    assert sorted(searched) == sorted(map(str, tfrecords))
    (kept,) = (cache_dir / "bn_jax" / "tfrecord_index").iterdir()
    assert len(kept.read_bytes()) == 32 + 8 * 12


@pytest.mark.parametrize("change", ["size", "time", "order"])
def test_index_of_changed_files_is_forgotten(tfrecords, monkeypatch, change):
    expected, lengths = list(RECORDS), (5, 5)
    Records(tfrecords, lengths, "tfrecord")
    searched = count_searches(monkeypatch)
    if change == "size":
        write_tfrecord(tfrecords[1], [b"other", *RECORDS[6:]])
        expected[5] = b"other"
    elif change == "time":
        write_tfrecord(tfrecords[1], RECORDS[:4:-1])
        os.utime(tfrecords[1], (1, 1))
        expected[5:] = RECORDS[:4:-1]
    else:
        tfrecords.reverse()
        expected = RECORDS[5:] + RECORDS[:5]
    found = Records(tfrecords, lengths, "tfrecord")
    assert len(searched) == 2
    assert [found[index] for index in range(10)] == expected


def test_files_elsewhere_have_an_index_of_their_own(tmp_path):
    contents = ([b"a", b"bcd"], [b"abc", b"d"])
    for number, content in enumerate(contents):
        path = tmp_path / str(number)
        write_tfrecord(path, content)
        os.utime(path, (1, 1))
        found = Records([path], [2], "tfrecord")
        assert [found[0], found[1]] == content


@pytest.mark.parametrize("damage", [b"", b"short", "flip", "directory"])
def test_damaged_cache_is_rebuilt(tfrecords, cache_dir, monkeypatch, damage):
    Records(tfrecords, (5, 5), "tfrecord")
    (kept,) = (cache_dir / "bn_jax" / "tfrecord_index").iterdir()
    original = kept.read_bytes()
    if damage == "flip":
        flip_bit(kept, 60)
    elif damage == "directory":
        kept.unlink()
        kept.mkdir()
    else:
        kept.write_bytes(damage)
    searched = count_searches(monkeypatch)
    found = Records(tfrecords, (5, 5), "tfrecord")
    assert [found[index] for index in range(10)] == RECORDS
    assert len(searched) == 2
    assert damage == "directory" or kept.read_bytes() == original


def test_cache_that_cannot_be_written(tfrecords, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    found = Records(tfrecords, (5, 5), "tfrecord")
    assert [found[index] for index in range(10)] == RECORDS


def test_default_cache_is_in_the_home_directory(tfrecords, tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    Records(tfrecords, (5, 5), "tfrecord")
    directory = tmp_path / "home" / ".cache" / "bn_jax" / "tfrecord_index"
    assert len(list(directory.iterdir())) == 1


def test_progress_shows_only_when_it_takes_long(tfrecords, monkeypatch, capsys):
    Records(tfrecords, (5, 5), "tfrecord")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(files, "_SECONDS_UNTIL_PROGRESS_SHOWS", -1)
    Records(tfrecords, (5, 5), "tfrecord")
    assert "2/2" in capsys.readouterr().err
