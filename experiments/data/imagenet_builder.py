"""A TFDS builder of ImageNet 2012 that needs no TensorFlow."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from experiments.data.errors import DataError
from experiments.data.imagenet_archives import (
    TRAIN,
    VALIDATION,
    Archive,
    ArchivedImage,
    read_train,
    read_validation,
)
from experiments.data.shuffling import collect, distribute
from experiments.distributed.progress import progress_bar

if TYPE_CHECKING:
    import tensorflow_datasets as tfds
    from tqdm import tqdm

NAME = "imagenet2012"

# By TFDS, in its package: the classes of validation images 1, 2, ...
VALIDATION_LABELS = "datasets/imagenet2012/validation_labels.txt"
_MEGABYTE = 10**6

_Examples = Iterator[tuple[str, dict[str, Any]]]
_Shard = Callable[[], _Examples]


class _Source(NamedTuple):
    """Where the images of a split come from."""

    archive: Archive
    read: Callable[[Path, IO[bytes]], Iterator[ArchivedImage]]


def make_builder(
    manual_dir: Path, data_dir: Path, *, official: bool
) -> tfds.core.DatasetBuilder:
    """Returns a builder like TFDS's own but for how it reads and shuffles.

    TFDS's own reads archives, and shuffles what exceeds 1 GB, by TensorFlow. This one
    reads the archives once, from start to end, into temporary files, and these in
    shuffled order. The examples come in the order that TFDS's own gives them.

    Args:
      manual_dir: where the two archives are.
      data_dir: the directory of prepared sets, on this machine.
      official: whether the archives must hold the official numbers of images.
    """
    import tensorflow_datasets as tfds

    registered = tfds.builder_cls(NAME)(data_dir=data_dir)
    classes = frozenset(registered.info.features["label"].names)
    validation_labels = tfds.core.tfds_path(VALIDATION_LABELS).read_text().split()
    sources = {
        "train": _Source(TRAIN, functools.partial(read_train, classes=classes)),
        "validation": _Source(
            VALIDATION, functools.partial(read_validation, labels=validation_labels)
        ),
    }

    with tfds.core.registered.skip_registration():

        class Imagenet2012(tfds.core.ShardBasedBuilder):  # type: ignore[misc]
            name = NAME
            VERSION = registered.VERSION

            def _info(self) -> tfds.core.DatasetInfo:
                return tfds.core.DatasetInfo(
                    builder=self,
                    description=registered.info.description,
                    features=registered.info.features,
                    supervised_keys=registered.info.supervised_keys,
                    homepage=registered.info.homepage,
                    citation=registered.info.citation,
                )

            def _shard_iterators_per_split(self, _: object) -> dict[str, list[_Shard]]:
                return _read_archives(
                    sources, manual_dir, Path(self.data_dir), official
                )

    return Imagenet2012(data_dir=data_dir, file_format="array_record")


def _read_archives(
    sources: Mapping[str, _Source], manual_dir: Path, directory: Path, official: bool
) -> dict[str, list[_Shard]]:
    """Writes the archives' images to temporary files; returns the shards to write."""
    paths = [manual_dir / source.archive.file_name for source in sources.values()]
    megabytes = sum(path.stat().st_size // _MEGABYTE for path in paths)
    shards = {}
    with progress_bar(megabytes, 0, "MB read") as bar:
        for path, (split, source) in zip(paths, sources.items(), strict=True):
            unsorted = directory / f"unsorted-{split}"
            unsorted.mkdir(mode=0o700)  # what is written there is taken at its word
            with path.open("rb") as file:
                images = _show_position(source.read(path, file), file, bar)
                written = distribute(_to_records(split, images), unsorted)
            found, expected = written.num_records, source.archive.num_images
            if found == 0 or (official and found != expected):
                raise DataError(
                    f"archive {path} holds {found:,} images, not {expected:,}; "
                    "download it again"
                )
            shards[split] = _divide(unsorted, *written)
    return shards


def _show_position(
    images: Iterator[ArchivedImage], file: IO[bytes], bar: tqdm[None]
) -> Iterator[ArchivedImage]:
    before = bar.n
    for image in images:
        yield image
        bar.update(before + file.tell() // _MEGABYTE - bar.n)


def _to_records(
    split: str, images: Iterator[ArchivedImage]
) -> Iterator[tuple[bytes, bytes]]:
    for image in images:
        # The key that TFDS orders examples by.
        key = hashlib.md5(f"{split}{image.file_name}".encode()).digest()
        names = [image.file_name.encode(), image.label.encode()]  # printable
        yield key, b"\0".join([*names, image.content])


def _divide(unsorted: Path, num_images: int, num_bytes: int) -> list[_Shard]:
    """Returns a split's shards, to be written one after the other."""
    from tensorflow_datasets.core.utils import shard_utils

    num_shards = shard_utils.ShardConfig.calculate_number_shards(num_bytes, num_images)
    boundaries = [0, *shard_utils.get_shard_boundaries(num_images, num_shards)]
    lengths = [end - start for start, end in itertools.pairwise(boundaries)]
    examples = _sorted_examples(unsorted, num_images)
    # The last one takes what is left, so that the examples come to their end.
    stops = [*lengths[:-1], None]
    return [functools.partial(itertools.islice, examples, stop) for stop in stops]


def _sorted_examples(unsorted: Path, num_images: int) -> _Examples:
    with progress_bar(num_images, 0, "images written") as bar:
        for record in collect(unsorted, num_images):
            try:
                name, class_name, content = record.split(b"\0", 2)
                file_name, label = name.decode(), class_name.decode()
            except ValueError:
                raise DataError(
                    f"the temporary files in {unsorted} were changed; start again"
                ) from None
            yield file_name, {"image": content, "label": label, "file_name": file_name}
            bar.update()
