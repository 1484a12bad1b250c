"""Image files in folders: which there are, of which class, and in which split."""

import hashlib
import os
import re
import stat
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.data.errors import DataError, printable

# Folders of a split, and what it is called in the set.
SPLITS = {
    "train": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
}
HELD_OUT = "validation"  # the split of what is held out where there is no other


class ImageFile(NamedTuple):
    """One file that should hold an image."""

    name: str  # below the folder of images
    label: int  # position of its class
    num_bytes: int
    modified: int  # nanoseconds


class Images(NamedTuple):
    """All files that are to become a set."""

    classes: tuple[str, ...]
    splits: dict[str, list[ImageFile]]  # by the name of the split
    left_out: dict[str, str]  # what is no image of a class, and why


def find_images(
    directory: Path,
    held_out: float,
    labels: Mapping[str, str],
    classes: Sequence[str] = (),
) -> Images:
    """Looks through the folders, and reads no file.

    Args:
      directory: holds a folder a class, or folders of splits that do (see `SPLITS`).
      held_out: share of the images that is held out where there is no split, by a hash
        of their names below the directory.
      labels: the class of each file that lies in val itself, by its name.
      classes: all there may be, in their order; empty: those of the training images,
        by name.

    Raises:
      DataError: they are arranged in another way, or one cannot be told the class of.
    """
    if not directory.is_dir():
        raise DataError(f"--image_dir={directory} is no folder: expected one of images")
    folders = [entry.name for entry in _entries(directory) if entry.is_dir()]
    named = [name for name in folders if name in SPLITS]
    # A class may be called train, too.
    divided = "train" in named and (len(named) > 1 or len(folders) == 1)
    left_out: dict[str, str] = {}
    found = {
        name: list(_in_classes(directory, name, labels, left_out))
        for name in (named if divided else [""])
    }
    if divided:
        others = sorted(set(folders) - set(named))
        left_out |= dict.fromkeys(others, "beside the folders of splits")
    splits: dict[str, list[tuple[str, str, os.stat_result]]] = {}
    for name, files in found.items():
        if files:
            splits.setdefault(SPLITS.get(name, "train"), []).extend(files)
    training = splits.get("train", [])
    classes = tuple(classes or sorted({label for _, label, _ in training}))
    _check_classes(directory, classes, splits)
    numbers = {name: number for number, name in enumerate(classes)}
    images = {
        split: [
            ImageFile(name, numbers[label], status.st_size, status.st_mtime_ns)
            for name, label, status in sorted(files)
        ]
        for split, files in splits.items()
    }
    if len(images) == 1:
        kept = [file for file in images["train"] if not _is_held_out(file, held_out)]
        held = [file for file in images["train"] if _is_held_out(file, held_out)]
        images = {"train": kept, HELD_OUT: held}
    for split, chosen in images.items():
        if not chosen:
            raise DataError(
                f"no image of {directory} is in {split}, of {len(training)}: expected "
                "more images, or another --held_out"
            )
    return Images(classes, images, left_out)


def read_labels(path: Path) -> dict[str, str]:
    """Reads the classes of files: a line a file, its name and its class.

    Between them stands a space or a comma; names may lack their suffix, and what
    follows the class is not looked at, so that Kaggle's LOC_val_solution.csv will do.

    Raises:
      DataError: there are no such lines.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeError) as error:
        raise DataError(f"--labels={path} cannot be read: {error}") from None
    pairs = [re.split(r"[,\s]+", line.strip())[:2] for line in lines if line.strip()]
    if not pairs or any(len(pair) < 2 for pair in pairs):
        raise DataError(
            f"--labels={path}: expected a file's name and its class in every line, as "
            "ILSVRC2012_val_00000001.JPEG n01751748"
        )
    return {name: label for name, label in pairs}


def _is_held_out(file: ImageFile, share: float) -> bool:
    digest = hashlib.md5(os.fsencode(file.name)).digest()
    return int.from_bytes(digest[:8]) < share * 2**64


def _in_classes(
    directory: Path, split: str, labels: Mapping[str, str], left_out: dict[str, str]
) -> Iterator[tuple[str, str, os.stat_result]]:
    """Yields name, class and status of every file of a split."""
    for entry in _entries(directory / split):
        name = os.path.join(split, entry.name)
        if entry.is_dir():
            for below, status in _below(directory, name, left_out):
                yield below, entry.name, status
        elif label := labels.get(entry.name) or labels.get(Path(entry.name).stem):
            yield name, label, entry.stat()
        elif SPLITS.get(split) == HELD_OUT:
            raise DataError(
                f"{directory / printable(name)} is in no folder of a class: expected "
                "one a class, or --labels=FILE with the class of every file"
            )
        else:
            left_out[printable(name)] = "in no folder of a class"


def _below(
    directory: Path, folder: str, left_out: dict[str, str]
) -> Iterator[tuple[str, os.stat_result]]:
    for entry in _entries(directory / folder):
        name = os.path.join(folder, entry.name)
        try:
            status = entry.stat()
        except OSError as error:
            left_out[printable(name)] = str(error.strerror)
            continue
        if stat.S_ISREG(status.st_mode):
            yield name, status
        elif entry.is_dir(follow_symlinks=False):
            yield from _below(directory, name, left_out)
        else:
            left_out[printable(name)] = "no plain file"


def _entries(folder: Path) -> list["os.DirEntry[str]"]:
    """What is in a folder, but hidden files."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(f"folder {folder} cannot be read: {error.strerror}") from None


def _check_classes(
    directory: Path,
    classes: Sequence[str],
    splits: Mapping[str, Collection[tuple[str, str, os.stat_result]]],
) -> None:
    if len(classes) < 2:
        raise DataError(
            f"{directory} has images of {len(classes)} classes: expected a folder a "
            "class, with images in it, or train and val with such folders"
        )
    for name in classes:
        # TFDS keeps them as the lines of a text.
        if not name.isprintable() or name != name.strip():
            raise DataError(f"a class is called {name!a}; give its folder a plain name")
    for split, files in splits.items():
        if unknown := sorted({label for _, label, _ in files} - set(classes)):
            raise DataError(
                f"{split} has images of {len(unknown)} classes that are not among the "
                f"{len(classes)} to be learned, {unknown[0]} first; move them away"
            )
