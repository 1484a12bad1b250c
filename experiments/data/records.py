"""The records of a prepared set's files, in the two forms that TFDS writes."""

import bisect
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from etils import epath

from experiments.data.errors import DataError, first_line
from experiments.data.files import file_status, map_files, missing_file
from experiments.data.splits import UndecodableError
from experiments.data.tfrecord import read_record_at, read_records
from experiments.data.tfrecord_index import load_offsets

FILE_FORMATS = ("array_record", "tfrecord")

# Each keeps a file open; systems let a process have 1,024 of them, or 256.
_MAX_ARRAY_RECORD_READERS = 512
# Nothing but the record that is asked for.
_READER_OPTIONS = "readahead_buffer_size:0"


class _Source(Protocol):
    """Reads a record, given the number of its file and its number in the file."""

    def __call__(self, file: int, number: int) -> bytes: ...


class Records:
    """The records of one split, by their number.

    Any number of threads may read them, and a pickled copy other processes.
    """

    def __init__(
        self,
        paths: Sequence[epath.PathLike],
        lengths: Sequence[int],
        file_format: str,
    ) -> None:
        """Opens the files.

        Args:
          paths: the files, which `etils.epath` can open. array_record files in a bucket
            can be read as far as array_record's own reader can.
          lengths: how many records each file is to hold.
          file_format: "array_record" or "tfrecord".

        Raises:
          DataError: if a file is missing, truncated or not of that form, or holds
            another number of records.
        """
        self._paths = [epath.Path(path) for path in paths]
        self._ends = list(itertools.accumulate(lengths))
        self._read = _SOURCES[file_format](self._paths, lengths)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> bytes:
        """Reads a record.

        Raises:
          IndexError: if index is not in [0, number of records).
          UndecodableError: if the record is damaged; the message says how, and
            `describe` where it lies.
        """
        return self._read(*self._locate(index))

    def describe(self, index: int) -> str:
        """Names a record, for messages: its number in its file, and the file."""
        file, number = self._locate(index)
        return f"example {number} (from 0) of record file {self._paths[file]}"

    def _locate(self, index: int) -> tuple[int, int]:
        """Returns the number of the file, and the record's number in it."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        file = bisect.bisect_right(self._ends, index)
        return file, index - (self._ends[file - 1] if file else 0)


def read_file(path: epath.Path, length: int, file_format: str) -> list[bytes]:
    """Reads all records of one file.

    Args:
      path: the file.
      length: how many records it is to hold.
      file_format: "array_record" or "tfrecord".

    Raises:
      DataError: if the file is missing or damaged, or holds another number of records.
    """
    if not path.exists():
        raise missing_file(path)
    if file_format == "tfrecord":
        records = list(read_records(path))
    else:
        file_status(path)
        reader = _open_array_record(path)
        try:
            records = reader.read_all()
        except RuntimeError as error:
            raise _damaged_array_record(path, error) from error
    check_length(path, len(records), length)
    return records


class _TFRecords:
    """Records of TFRECORD files, which are opened for each read."""

    def __init__(self, paths: Sequence[epath.Path], lengths: Sequence[int]) -> None:
        self._paths = paths
        self._offsets = load_offsets(paths, lengths)
        for path, found, length in zip(paths, self._offsets, lengths, strict=True):
            check_length(path, len(found) - 1, length)

    def __call__(self, file: int, number: int) -> bytes:
        start, end = self._offsets[file][number : number + 2].tolist()
        return read_record_at(self._paths[file], start, end)


class _ArrayRecords:
    """Records of array_record files, which stay open in the process that reads them."""

    def __init__(self, paths: Sequence[epath.Path], lengths: Sequence[int]) -> None:
        def count(path: epath.Path) -> int:
            file_status(path)  # to array_record, a missing file is an empty one
            return _open_array_record(path).num_records()

        self._paths = paths
        for path, found, length in zip(
            paths, map_files(count, paths), lengths, strict=True
        ):
            check_length(path, found, length)

    def __call__(self, file: int, number: int) -> bytes:
        try:
            record: bytes = self._open(self._paths[file]).read([number])[0]
        except RuntimeError as error:
            raise UndecodableError(first_line(error)) from None
        return record

    @functools.cached_property
    def _open(self) -> Callable[[epath.Path], Any]:
        # A reader may be used by several threads, even after it is forgotten here.
        return functools.lru_cache(_MAX_ARRAY_RECORD_READERS)(_open_array_record)

    def __getstate__(self) -> dict[str, Any]:
        """Leaves the open files behind: a worker process opens its own."""
        return {"_paths": self._paths}


_SOURCES: Mapping[str, Callable[[Sequence[epath.Path], Sequence[int]], _Source]] = {
    "array_record": _ArrayRecords,
    "tfrecord": _TFRecords,
}


def _open_array_record(path: epath.Path) -> Any:
    """Returns array_record's reader of a file."""
    from array_record.python import array_record_module

    reader = array_record_module.ArrayRecordReader(str(path), options=_READER_OPTIONS)
    if not reader.ok():
        # Only closing it says what the matter is.
        try:
            reader.close()
        except RuntimeError as error:
            raise _damaged_array_record(path, error) from error
    return reader


def _damaged_array_record(path: epath.Path, error: RuntimeError) -> DataError:
    reason = first_line(error)
    if "://" in str(path):
        return DataError(
            f"record file {path} cannot be opened by array_record ({reason}): expected "
            "a file of this machine; mount the bucket, for example with gcsfuse, and "
            "choose the mounted folder, or prepare the data set as TFRECORD"
        )
    return DataError(
        f"record file {path} is truncated or corrupted ({reason}): expected whole "
        "array_record chunks; copy the file again, or prepare its data set again"
    )


def check_length(path: epath.Path, found: int, expected: int) -> None:
    """Raises DataError where a file holds another number of examples than expected."""
    if found != expected:
        raise DataError(
            f"record file {path} holds {found} examples: expected {expected}, "
            "as its dataset_info.json says; prepare the data set again"
        )
