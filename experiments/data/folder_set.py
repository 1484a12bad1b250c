"""Makes a set, in the form that TFDS gives them, of images in folders."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from experiments.data import folder_report
from experiments.data.core_processes import core_processes
from experiments.data.datasets import CLUTTERED_MNIST
from experiments.data.errors import DataError
from experiments.data.folder_shards import (
    Shard,
    Written,
    divide,
    read_written,
    write_shard,
)
from experiments.data.image_folders import Images, find_images, read_labels
from experiments.data.imagenet_archives import TRAIN, VALIDATION
from experiments.data.imagenet_builder import NAME as IMAGENET
from experiments.data.imagenet_builder import VALIDATION_LABELS
from experiments.data.new_directory import alone, clear
from experiments.distributed.progress import progress_bar
from experiments.running.new_files import whole_file

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

_VERSION = "1.0.0"
_SPACE_NEEDED = 1.02  # times the size of the images
_PLAN = "plan.txt"


class _Kind(NamedTuple):
    """What differs between ImageNet and a set of somebody's own."""

    version: str
    classes: Sequence[str]  # empty: as found
    labels: Mapping[str, str]  # of files in val itself
    info: tfds.core.DatasetInfo | None


def prepare_folders(
    name: str,
    image_dir: Path,
    data_dir: Path,
    *,
    held_out: float = 0.1,
    labels: Path | None = None,
    official: bool = True,
    dry_run: bool = False,
) -> None:
    """Makes the set, or goes on making it, on all cores, and reports on the images.

    Files of records are written beside the set's place and stay there if the process
    is stopped; when all are there the set takes its place at once.

    Args:
      name: of the new set. As imagenet2012 it has that set's version and classes.
      image_dir: the images, as `find_images` takes them.
      data_dir: the directory of prepared sets, on this machine.
      held_out: the share that is held out where there is no split.
      labels: a file of `read_labels`.
      official: whether imagenet2012 must have the official numbers of images.
      dry_run: whether to say only what would be made.

    Raises:
      DataError: the images are not arranged so, none can be read, or the set cannot
        be written or is there already, made of other images.
    """
    kind = _kind(name, labels)
    target = data_dir / name / kind.version
    if target.resolve().is_relative_to(image_dir.resolve()):
        raise DataError(
            f"{target} would lie among the images; choose another --data_dir"
        )
    images = find_images(image_dir, held_out, kind.labels, kind.classes)
    if name == IMAGENET and official:
        _check_official(image_dir, images)
    if dry_run:
        print(f"Dry run: nothing was written; {target} would hold")
        print(folder_report.counts(images))
        return
    plan = _fingerprint(images)
    if target.exists():
        _check_same(target, plan)
        print(f"{name} is already prepared in {target}; nothing to do.")
        return
    temporary = target.with_name(".preparing")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    with alone(temporary, name):
        _take_up(temporary, plan)
        splits = {
            split: divide(split, files, temporary)
            for split, files in images.splits.items()
        }
        shards = [shard for each in splits.values() for shard in each]
        written = _write_all(image_dir, shards, temporary)
        report = folder_report.make(images, shards, written, plan)
        whole = temporary / "set"
        whole.mkdir(mode=0o700)
        _finish(name, kind, images, splits, written, whole)
        with whole_file(whole / folder_report.FILE_NAME) as file:
            file.write(json.dumps(report, indent=1).encode())
        whole.chmod(temporary.parent.stat().st_mode & 0o777)
        whole.rename(target)
        clear(temporary)
    print(folder_report.as_text(report))
    print(f"{name} is prepared in {target}, with all of this in report.json.")


def _kind(name: str, labels: Path | None) -> _Kind:
    import tensorflow_datasets as tfds

    if not tfds.core.naming.is_valid_dataset_name(name) or "/" in name:
        raise DataError(
            f"{name!r} is no name for a set: expected letters, digits and _, such as "
            "my_photos"
        )
    if name == CLUTTERED_MNIST:
        raise DataError(
            f"{name} is composed of the bundled digits; choose another name"
        )
    named = {} if labels is None else read_labels(labels)
    if name != IMAGENET:
        return _Kind(_VERSION, (), named, None)
    with contextlib.redirect_stdout(io.StringIO()):
        builder = tfds.builder_cls(IMAGENET)()
    known = tfds.core.tfds_path(VALIDATION_LABELS).read_text().split()
    official = {
        f"ILSVRC2012_val_{number:08}.JPEG": label
        for number, label in enumerate(known, 1)
    }
    classes = tuple(builder.info.features["label"].names)
    return _Kind(str(builder.version), classes, named or official, builder.info)


def _check_official(image_dir: Path, images: Images) -> None:
    expected = {"train": TRAIN.num_images, "validation": VALIDATION.num_images}
    found = {split: len(images.splits.get(split, ())) for split in expected}
    if found != expected:
        raise DataError(
            f"{image_dir} holds {found['train']:,} training and "
            f"{found['validation']:,} validation images: expected "
            f"{expected['train']:,} and {expected['validation']:,}; extract the "
            "archives again, or give --check=none for a part of ImageNet"
        )


def _fingerprint(images: Images) -> str:
    """What tells images apart that are to become a set; hexadecimal."""
    return hashlib.sha256(ascii(images).encode()).hexdigest()


def _check_same(target: Path, plan: str) -> None:
    try:
        same = folder_report.read_plan(target) in (plan, None)
    except (OSError, ValueError):
        same = False
    if not same:
        raise DataError(
            f"{target} is there, made of other images than these: expected none, or "
            "the same; remove it, or choose another name"
        )


def _take_up(temporary: Path, plan: str) -> None:
    """Keeps what is there of a process that was stopped, if it made the same set."""
    path = temporary / _PLAN
    try:
        same = not temporary.is_symlink() and path.read_text() == plan
    except (OSError, ValueError):
        same = False
    if not same:
        clear(temporary)
        temporary.mkdir(mode=0o700)  # what is written there is taken at its word
        with whole_file(path) as file:
            file.write(plan.encode())
    # What was moved there is made again.
    clear(temporary / "set")


def _write_all(
    image_dir: Path, shards: Sequence[Shard], temporary: Path
) -> list[Written]:
    done = {
        shard.path: written
        for shard in shards
        if shard.path.exists() and (written := read_written(shard)) is not None
    }
    missing = [shard for shard in shards if shard.path not in done]
    needed = sum(image.num_bytes for shard in missing for image in shard.images)
    if (free := shutil.disk_usage(temporary).free) < needed * _SPACE_NEEDED:
        raise DataError(
            f"{temporary.parent} has {free:,} bytes free: expected at least "
            f"{int(needed * _SPACE_NEEDED):,}; free some, or choose another --data_dir"
        )
    total = sum(len(shard.images) for shard in shards)
    before = total - sum(len(shard.images) for shard in missing)
    with (
        progress_bar(total, before, "image") as bar,
        core_processes(len(missing)) as pool,
    ):
        found = pool.map(write_shard, [image_dir] * len(missing), missing)
        for shard, written in zip(missing, found, strict=True):
            done[shard.path] = written
            bar.update(len(shard.images))
    return [done[shard.path] for shard in shards]


def _finish(
    name: str,
    kind: _Kind,
    images: Images,
    splits: Mapping[str, Sequence[Shard]],
    written: Sequence[Written],
    whole: Path,
) -> None:
    """Moves the files of records to the folder that becomes the set, with metadata."""
    import tensorflow_datasets as tfds

    by_path = {
        shard.path: each
        for shard, each in zip(
            (shard for shards in splits.values() for shard in shards),
            written,
            strict=True,
        )
    }
    infos = []
    for split, shards in splits.items():
        kept = [shard.path for shard in shards if by_path[shard.path].length]
        if not kept:
            raise DataError(
                f"no image of {split} can be read: expected JPEGs or PNGs, the first "
                f"{folder_report.first_problem(written)}"
            )
        for number, path in enumerate(kept):
            file_name = f"{name}-{split}.array_record-{number:05}-of-{len(kept):05}"
            path.rename(whole / file_name)
        infos.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[by_path[path].length for path in kept],
                num_bytes=sum(by_path[path].num_bytes for path in kept),
            )
        )
    sizes = {tuple(size) for each in written for size in each.sizes}
    shape = (*(sizes.pop() if len(sizes) == 1 else (None, None)), 3)
    with contextlib.redirect_stdout(io.StringIO()):
        tfds.folder_dataset.write_metadata(
            data_dir=whole,
            features=tfds.features.FeaturesDict(_features(kind, images, shape)),
            split_infos=infos,
            version=kind.version,
            check_data=False,
            supervised_keys=("image", "label"),
            description="Images from folders.",
        )


def _features(
    kind: _Kind, images: Images, shape: tuple[int | None, ...]
) -> dict[str, Any]:
    import tensorflow_datasets as tfds

    if kind.info is not None:
        return dict(kind.info.features)
    return {
        "image": tfds.features.Image(shape=shape),
        "label": tfds.features.ClassLabel(names=images.classes),
        "file_name": tfds.features.Text(),
    }
