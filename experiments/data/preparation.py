"""Prepares image sets of TFDS, ImageNet by code of our own and others by TFDS's."""

import contextlib
import io
from pathlib import Path
from typing import Any

from experiments.data.errors import DataError
from experiments.data.folder_set import prepare_folders
from experiments.data.imagenet import prepare_imagenet
from experiments.data.imagenet_builder import NAME as IMAGENET
from experiments.data.metadata import data_directory


def prepare(
    name: str, data_dir: str | None, manual_dir: str | None, *, official: bool = True
) -> None:
    """Prepares a set in the array_record form, unless it is there already.

    Args:
      name: the TFDS name, with a configuration if wanted.
      data_dir: the directory that is to hold the set, or None for TFDS's default.
      manual_dir: the directory of files that were downloaded by hand, if any.
      official: for ImageNet, as `prepare_imagenet` takes it.

    Raises:
      DataError: if the set cannot be prepared; the message says why.
    """
    directory = data_directory(data_dir)
    if name != IMAGENET:
        _prepare_registered(name, str(directory), manual_dir)
        return
    if manual_dir is None:
        raise DataError(
            f"{IMAGENET} is made from two archives that nobody may pass on: expected "
            "their folder as --manual_dir (see --help)"
        )
    prepare_imagenet(Path(manual_dir).expanduser(), _local(data_dir), official=official)


def prepare_own(
    name: str, image_dir: str, data_dir: str | None, **options: Any
) -> None:
    """Makes a set of images in folders, as `folder_set.prepare_folders` does.

    Args:
      name: of the set.
      image_dir: folder of the images.
      data_dir: the directory that is to hold the set, or None for TFDS's default.
      **options: as `prepare_folders` takes them.

    Raises:
      DataError: if the set cannot be made; the message says why.
    """
    prepare_folders(name, Path(image_dir).expanduser(), _local(data_dir), **options)


def _local(data_dir: str | None) -> Path:
    directory = str(data_directory(data_dir))
    if "://" in directory:
        raise DataError(
            f"--data_dir={directory} is no folder of this machine: expected one, in "
            "which files can be written; copy the set to the bucket afterwards"
        )
    return Path(directory)


def _prepare_registered(name: str, data_dir: str, manual_dir: str | None) -> None:
    """Downloads and prepares a set by its own code in TFDS."""
    import tensorflow_datasets as tfds

    try:
        # TFDS prints a banner over several lines where it lacks TensorFlow.
        with contextlib.redirect_stdout(io.StringIO()):
            builder = tfds.builder(name, data_dir=data_dir)
            prepared = builder.is_prepared()
            if not prepared:
                builder.download_and_prepare(
                    download_config=tfds.download.DownloadConfig(manual_dir=manual_dir),
                    file_format="array_record",
                )
    except tfds.core.DatasetNotFoundError:
        raise DataError(
            f"data set {name!r} is unknown to TFDS: expected one of those in its "
            "catalogue, https://www.tensorflow.org/datasets/catalog; correct the name"
        ) from None
    except ImportError as error:
        raise DataError(
            f"data set {name!r} cannot be prepared here ({error}): its own code in "
            "TFDS needs more than is installed; prepare it where that is, as "
            f"array_record or TFRECORD, and copy it to {data_dir}"
        ) from error
    # Each set's code fails in ways of its own, and says more than a line about it.
    except Exception as error:
        raise DataError(
            f"data set {name!r} cannot be prepared here ({type(error).__name__}: "
            f"{' '.join(str(error).split())}); mend that, or prepare it elsewhere, as "
            f"array_record or TFRECORD, and copy it to {data_dir}"
        ) from error
    state = "is already prepared" if prepared else "is prepared"
    print(f"{name} {state} in {builder.data_dir}")
