"""Work on the many files of a prepared set: in parallel, and none may be missing."""

import os
import stat
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

from etils import epath

from experiments.data.errors import DataError
from experiments.distributed.progress import progress_bar

# The work waits for disks and networks, not for processors.
_NUM_THREADS = 32
_SECONDS_UNTIL_PROGRESS_SHOWS = 2

Result = TypeVar("Result")


class FileStatus(NamedTuple):
    """What is known of a file without reading it."""

    size: int  # bytes
    mtime: float  # seconds


def file_status(path: epath.PathLike) -> FileStatus:
    """Looks at a file, which must be a plain one: others may be waited for for ever.

    Args:
      path: a local path, or any other that `etils.epath` knows, such as a bucket's.

    Raises:
      DataError: if it is a folder, a device or the like.
      FileNotFoundError: if there is no such file.
    """
    if "://" in os.fspath(path):
        remote = epath.Path(path).stat()
        return FileStatus(remote.length, remote.mtime)
    # Etils would ask for the name of the file's owner, who may have none.
    local = os.stat(path)
    if not stat.S_ISREG(local.st_mode):
        raise DataError(f"{path} is no plain file; copy it again")
    return FileStatus(local.st_size, local.st_mtime)


def map_files(
    function: Callable[[epath.Path], Result], paths: Sequence[epath.Path]
) -> list[Result]:
    """Calls a function for each file, with a progress bar if it takes long.

    Args:
      function: called from several threads; a FileNotFoundError that it raises says
        that its file is missing.
      paths: the files.

    Returns:
      The results, in the order of the paths.

    Raises:
      DataError: if a file is missing.
    """

    def call(path: epath.Path) -> Result:
        try:
            return function(path)
        except FileNotFoundError:
            raise missing_file(path) from None

    results: list[Result] = []
    bar = None
    started = time.monotonic()
    with ThreadPoolExecutor(_NUM_THREADS) as executor:
        for result in executor.map(call, paths):
            results.append(result)
            if bar is not None:
                bar.update()
            elif time.monotonic() - started > _SECONDS_UNTIL_PROGRESS_SHOWS:
                bar = progress_bar(len(paths), len(results), "files")
    if bar is not None:
        bar.close()
    return results


def missing_file(path: epath.Path) -> DataError:
    """The error that says that a file of a set is missing."""
    return DataError(
        f"record file {path} is missing: expected every file that its "
        "dataset_info.json lists; copy it again, or prepare the data set again"
    )
