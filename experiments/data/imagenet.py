"""Prepares ImageNet 2012 from its archives, without TensorFlow."""

import contextlib
import io
import shutil
from pathlib import Path

from experiments.data.errors import DataError
from experiments.data.imagenet_archives import TRAIN, VALIDATION, check_archives
from experiments.data.imagenet_builder import NAME, make_builder
from experiments.data.new_directory import temporary_directory

# Temporary files take the place of the archives' images, and the set takes theirs.
_SPACE_NEEDED = 1.02  # times the size of the archives


def prepare_imagenet(
    manual_dir: Path, data_dir: Path, *, official: bool = True
) -> None:
    """Prepares the training and the validation split, and shows how far it is.

    The set has the name, version, features and order of examples that TFDS's own
    builder gives it, in the array_record form. Images that are no RGB or grey JPEGs, 22
    in CMYK and a PNG, are kept as they are, where TFDS makes RGB JPEGs of them.

    If the set is there already, nothing is done. Otherwise it is written in a temporary
    directory beside its own, and moved when it is complete. What an earlier run that
    was killed left there is deleted.

    Args:
      manual_dir: where the two archives are.
      data_dir: the directory of prepared sets, on this machine.
      official: whether to refuse archives with other than the official sizes and
        numbers of images.

    Raises:
      DataError: if an archive is missing or damaged, if the disk is too small, or if
        another process is preparing the set.
    """
    directory = data_dir / NAME
    temporary = directory / ".preparing"
    builder = make_builder(manual_dir, temporary, official=official)
    version = directory / str(builder.version)
    if (version / "dataset_info.json").exists():
        print(f"{NAME} is already prepared in {version}; nothing to do.")
        return
    if version.exists():
        raise DataError(
            f"{version} is there but holds no prepared set: expected one, or nothing; "
            "remove it, or choose another --data_dir"
        )
    check_archives(manual_dir, builder.info.features["label"].names, official=official)
    directory.mkdir(parents=True, exist_ok=True)
    with temporary_directory(temporary, NAME):
        _check_space(manual_dir, directory)
        print(f"preparing {NAME} in {version}", flush=True)
        # TFDS prints what it does not know: sizes.
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare()
        Path(builder.data_dir).rename(version)
    for split in builder.info.splits.values():
        print(f"{split.name}: {split.num_examples:,} images, {split.num_shards} files")


def _check_space(manual_dir: Path, directory: Path) -> None:
    archives = [manual_dir / archive.file_name for archive in (TRAIN, VALIDATION)]
    needed = int(_SPACE_NEEDED * sum(path.stat().st_size for path in archives))
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise DataError(
            f"{directory} has {free:,} bytes free: expected at least {needed:,}; free "
            "some, or choose another --data_dir"
        )
