"""Rewrites a set that was prepared as TFRECORD in the array_record form."""

import json
from collections.abc import Sequence
from pathlib import Path

from etils import epath

from experiments.data.core_processes import core_processes
from experiments.data.errors import DataError
from experiments.data.files import missing_file
from experiments.data.metadata import data_directory, read_info
from experiments.data.new_directory import temporary_directory
from experiments.data.records import check_length
from experiments.data.tfrecord import read_records
from experiments.distributed.progress import progress_bar

# As TFDS writes them: every record can be read without its neighbours.
WRITER_OPTIONS = "group_size:1"
_INFO_FILE = "dataset_info.json"


def convert(name: str, source_dir: str, data_dir: str | None) -> None:
    """Writes a copy of a set, with the same records in the same order, on all cores.

    Args:
      name: the TFDS name, with a configuration or version if wanted.
      source_dir: the directory of prepared sets that holds the set as TFRECORD.
      data_dir: the directory that is to hold the copy, on this machine; None: TFDS's
        default.

    Raises:
      DataError: there is no such set, it is in another form or damaged, or the copy is
        there already or cannot be written.
    """
    info = read_info(name, source_dir)
    source = epath.Path(info.data_dir)
    if info.file_format.value != "tfrecord":
        raise DataError(
            f"data set {name!r} in {source} has the form {info.file_format.value}: "
            "expected tfrecord; use it as it is"
        )
    target = Path(data_directory(data_dir)) / source.relative_to(
        data_directory(source_dir)
    )
    if target.exists():
        raise DataError(
            f"{target} is there already: expected nothing; choose another --data_dir"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / ".preparing"
    paths, lengths = [], []
    for split in info.splits.values():
        paths += [epath.Path(path) for path in split.filepaths]
        lengths += list(split.shard_lengths)
    with temporary_directory(temporary, name):
        temporary.mkdir()
        _convert_files(paths, lengths, temporary)
        for path in source.iterdir():
            if path.suffix in (".json", ".txt") and path.name != _INFO_FILE:
                (temporary / path.name).write_bytes(path.read_bytes())
        content = json.loads((source / _INFO_FILE).read_text())
        for entry in content["splits"]:
            if template := entry.get("filepathTemplate"):
                entry["filepathTemplate"] = template.replace("tfrecord", "array_record")
        content["fileFormat"] = "array_record"
        (temporary / _INFO_FILE).write_text(json.dumps(content, indent=2))
        temporary.rename(target)
    print(f"{name}: {sum(lengths):,} examples in {len(paths)} files, in {target}")


def _convert_files(
    paths: Sequence[epath.Path], lengths: Sequence[int], directory: Path
) -> None:
    with (
        core_processes(len(paths)) as pool,
        progress_bar(len(paths), 0, "file") as bar,
    ):
        targets = [
            directory / path.name.replace(".tfrecord-", ".array_record-")
            for path in paths
        ]
        for _ in pool.map(convert_file, paths, lengths, targets):
            bar.update()


def convert_file(path: epath.Path, length: int, target: Path) -> None:
    """Writes the records of a TFRECORD file to an array_record file.

    Args:
      path: the file.
      length: how many records it is to hold.
      target: the new file.

    Raises:
      DataError: the file is missing or damaged, or holds another number of records.
    """
    from array_record.python import array_record_module

    if not path.exists():
        raise missing_file(path)
    writer = array_record_module.ArrayRecordWriter(str(target), WRITER_OPTIONS)
    number = 0
    for record in read_records(path):
        writer.write(record)
        number += 1
    writer.close()
    check_length(path, number, length)
