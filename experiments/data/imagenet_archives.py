"""The two archives that ImageNet 2012 comes in: what they hold, and whether they do."""

import contextlib
import io
import math
import re
import tarfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from experiments.data.errors import DataError, first_line


class Archive(NamedTuple):
    """One archive, as image-net.org gives it out."""

    file_name: str
    num_bytes: int
    num_images: int


TRAIN = Archive("ILSVRC2012_img_train.tar", 147_897_477_120, 1_281_167)
VALIDATION = Archive("ILSVRC2012_img_val.tar", 6_744_924_160, 50_000)

_VALIDATION_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")
_MAX_LISTED = 20
_MAX_IMAGE_BYTES = 2**26  # photographs take a fraction


class ArchivedImage(NamedTuple):
    """One image file of an archive."""

    file_name: str
    label: str  # WordNet's name of its class, such as n01440764
    content: bytes


def check_archives(
    directory: Path, classes: Collection[str], *, official: bool
) -> None:
    """Checks within seconds that both archives are there and seem whole.

    Their sizes are looked at, the list of the archives of classes that the training
    archive consists of, and the name of the first validation image: not the images.

    Args:
      directory: where they are.
      classes: WordNet's names of all classes.
      official: whether the archives must have the official sizes, and every class its
        own archive.

    Raises:
      DataError: if something is missing or wrong. If a file is missing or has another
        size, what was expected and what was found are printed as trees.
    """
    problems = [
        problem
        for archive in (TRAIN, VALIDATION)
        if (problem := _compare_size(directory / archive.file_name, archive, official))
    ]
    if problems:
        print(_draw_trees(directory))
        raise DataError(
            f"{'; '.join(problems)}; download both archives from "
            "https://image-net.org/download-images, after registering there, and give "
            "their directory as --manual_dir"
        )
    path = directory / TRAIN.file_name
    with path.open("rb") as file, _naming(path):
        found = {_class_of(path, name, classes) for name, _ in _read_tar(file)}
    if missing := sorted(set(classes) - found) if official else []:
        raise _damaged(
            path,
            f"it lacks {len(missing)} of {len(classes)} classes, {missing[0]} first",
        )
    path = directory / VALIDATION.file_name
    with path.open("rb") as file, _naming(path):
        for name, _ in _read_tar(file):
            _validation_number(path, name)
            break


def read_train(
    path: Path, file: IO[bytes], classes: Collection[str]
) -> Iterator[ArchivedImage]:
    """Yields the images of the training archive, an archive of one archive a class.

    Args:
      path: of the archive, for messages.
      file: the archive, opened; its position shows how far the reading is.
      classes: WordNet's names of all classes.

    Raises:
      DataError: if the archive is damaged, or holds something else.
    """
    with _naming(path):
        for archive_name, archive in _read_tar(file):
            label = _class_of(path, archive_name, classes)
            for file_name, image in _read_tar(archive, _MAX_IMAGE_BYTES):
                yield ArchivedImage(file_name, label, image.read())


def read_validation(
    path: Path, file: IO[bytes], labels: Sequence[str]
) -> Iterator[ArchivedImage]:
    """Yields the images of the validation archive, which holds no labels.

    Args:
      path: of the archive, for messages.
      file: the archive, opened; its position shows how far the reading is.
      labels: WordNet's names of the classes of images 1, 2, ...

    Raises:
      DataError: if the archive is damaged, or holds something else.
    """
    with _naming(path):
        for file_name, image in _read_tar(file, _MAX_IMAGE_BYTES):
            number = _validation_number(path, file_name)
            if not 1 <= number <= len(labels):
                raise _damaged(path, f"its image {file_name} has no known label")
            yield ArchivedImage(file_name, labels[number - 1], image.read())


class _Bounded:
    """An archive from which tarfile reads no more than it has, nor much at once."""

    def __init__(self, file: IO[bytes]) -> None:
        self.size = file.seek(0, io.SEEK_END)
        self.tell, self.seekable = file.tell, file.seekable
        self._file = file
        file.seek(0)

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _MAX_IMAGE_BYTES:
            raise tarfile.ReadError(f"a header claims {size:,} bytes")
        return self._file.read(size)

    def seek(self, position: int) -> int:
        if not 0 <= position <= self.size:
            raise tarfile.ReadError(f"a header claims a place at byte {position:,}")
        return self._file.seek(position)


def _read_tar(
    file: IO[bytes], most: float = math.inf
) -> Iterator[tuple[str, IO[bytes]]]:
    """Yields the name, without directories, and the content of each file in a tar.

    Args:
      file: the archive.
      most: bytes that a file may have.

    Raises:
      tarfile.TarError: if there is anything else but files and folders, or a file that
        is not there whole, is too large, or has a name that no file should have.
    """
    bounded = _Bounded(file)
    # An IO as far as tarfile goes.
    with tarfile.open(fileobj=bounded, mode="r:") as archive:  # type: ignore[call-overload]
        for member in archive:
            if not member.name.isprintable():
                raise tarfile.ReadError(f"its member {member.name!a} has no plain name")
            if member.isdir():
                continue
            content = archive.extractfile(member) if member.isreg() else None
            if content is None or member.issparse():
                raise tarfile.ReadError(f"its member {member.name} is no plain file")
            if not 0 <= member.size <= min(most, bounded.size - member.offset_data):
                raise tarfile.ReadError(
                    f"its member {member.name} claims {member.size:,} bytes"
                )
            yield PurePosixPath(member.name).name, content
        # To tarfile a damaged header is the archive's end, which is a block of zeros.
        file.seek(archive.offset)
        if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.ReadError(f"no header where one belongs, at {archive.offset}")


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Names the archive in which tarfile met an error."""
    try:
        yield
    except (DataError, OSError):
        raise
    # Beside errors of its own, tarfile raises whatever a header happens to break.
    except Exception as error:
        raise _damaged(path, first_line(error)) from None


def _class_of(path: Path, archive_name: str, classes: Collection[str]) -> str:
    label = archive_name.removesuffix(".tar")
    if label not in classes:
        raise _damaged(
            path,
            f"it holds {archive_name}, where archives such as n01440764.tar belong",
        )
    return label


def _validation_number(path: Path, file_name: str) -> int:
    match = _VALIDATION_NAME.fullmatch(file_name)
    if match is None:
        raise _damaged(
            path,
            f"it holds {file_name}, where images such as ILSVRC2012_val_00000001.JPEG "
            "belong",
        )
    return int(match[1])


def _damaged(path: Path, problem: str) -> DataError:
    return DataError(
        f"archive {path} is damaged, or not ImageNet's: {problem}; download it again"
    )


def _compare_size(path: Path, archive: Archive, official: bool) -> str:
    """Says what is wrong with an archive's size, if anything is."""
    if not path.is_file():
        return f"{path} is missing"
    size = path.stat().st_size
    if official and size != archive.num_bytes:
        return f"{path} has {size:,} bytes, not {archive.num_bytes:,}"
    return ""


def _draw_trees(directory: Path) -> str:
    expected = [
        f"{archive.file_name}  {archive.num_bytes:,} bytes"
        for archive in (TRAIN, VALIDATION)
    ]
    paths = sorted(directory.iterdir()) if directory.is_dir() else []
    found = [
        f"{path.name}  {path.stat().st_size:,} bytes" if path.is_file() else path.name
        for path in paths[:_MAX_LISTED]
    ]
    if len(paths) > _MAX_LISTED:
        found.append(f"... and {len(paths) - _MAX_LISTED} more")
    return "\n".join(
        line
        for title, entries in (
            ("expected:", expected),
            ("found:", found or ["nothing"]),
        )
        for line in (title, f"{directory}/", *_draw_branches(entries))
    )


def _draw_branches(entries: Sequence[str]) -> list[str]:
    *others, last = entries
    return [*(f"├── {entry}" for entry in others), f"└── {last}"]
