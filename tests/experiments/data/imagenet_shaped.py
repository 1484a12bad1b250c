"""A small ImageNet: its archives, and the set that is prepared from them.

Files of many sizes, in colour, grey, CMYK, one that is a PNG, and one that is broken.
Their class shows in their colour and brightness.
"""

import io
import tarfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image

from tests.experiments.data.prepared_sets import Examples, prepare_set

VERSION = "5.1.0"  # TFDS's
NUM_SHARDS = 2
CLASSES = (0, 207, 386, 483, 624, 779, 888, 999)  # of the 1,000

# Everything else is in colour. Whole numbers are of images, remainders of 10.
BROKEN, PNG = 4, 8
GREY_REMAINDERS, CMYK_REMAINDERS = (2, 5), (6,)


class ShapedImage(NamedTuple):
    file_name: str
    label: str  # such as n01440764
    content: bytes


def make_imagenet(
    data_dir: Path,
    *,
    file_format: str = "array_record",
    num_train: int,
    num_validation: int,
    num_test: int = 0,
    broken: bool = True,
    seed: int = 0,
) -> None:
    """Prepares a set `imagenet2012`, as TFDS would if ImageNet were so small.

    Args:
      data_dir: the directory of prepared sets.
      file_format: "array_record" or "tfrecord".
      num_train: images to train with.
      num_validation: images to validate with.
      num_test: images whose label is secret; without any there is no such split.
      broken: whether a file in the train and the validation split, number `BROKEN`
        of those made, cannot be decoded.
      seed: of the images.
    """
    import tensorflow_datasets as tfds

    def to_examples(images: Iterable[ShapedImage], secret: bool = False) -> Examples:
        return [
            {
                "image": image.content,
                "label": -1 if secret else image.label,
                "file_name": image.file_name,
            }
            for image in images
        ]

    splits = {
        "train": to_examples(train_images(num_train, broken, seed)),
        "validation": to_examples(validation_images(num_validation, broken, seed)),
    }
    if num_test:
        images = train_images(num_test, False, seed + 1)
        splits["test"] = to_examples(images, secret=True)
    prepare_set(
        data_dir,
        splits,
        {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(names=_lines("labels.txt")),
            "file_name": tfds.features.Text(),
        },
        name="imagenet2012",
        version=VERSION,
        file_format=file_format,
        num_shards=NUM_SHARDS,
    )


def make_archives(
    manual_dir: Path,
    *,
    num_train: int,
    num_validation: int,
    broken: bool = True,
    seed: int = 0,
) -> None:
    """Writes the two archives that the same images would come in."""
    by_class = defaultdict(dict)
    for image in train_images(num_train, broken, seed):
        by_class[f"{image.label}.tar"][image.file_name] = image.content
    validation = validation_images(num_validation, broken, seed)
    archives = {
        "train": {name: make_tar(files) for name, files in by_class.items()},
        "val": {image.file_name: image.content for image in validation},
    }
    manual_dir.mkdir(parents=True, exist_ok=True)
    for name, files in archives.items():
        (manual_dir / f"ILSVRC2012_img_{name}.tar").write_bytes(make_tar(files))


def make_tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def train_images(count: int, broken: bool, seed: int) -> list[ShapedImage]:
    labels = _lines("labels.txt")
    images = []
    for number in range(count):
        position = number % len(CLASSES)
        label = labels[CLASSES[position]]
        content = _encode(position, number, broken, seed, 0)
        images.append(ShapedImage(f"{label}_{number}.JPEG", label, content))
    return images


def validation_images(count: int, broken: bool, seed: int) -> list[ShapedImage]:
    """Images numbered as those of ImageNet that are of these classes."""
    labels = _lines("labels.txt")
    positions = {labels[index]: position for position, index in enumerate(CLASSES)}
    numbered = [
        (number, label)
        for number, label in enumerate(_lines("validation_labels.txt"), start=1)
        if label in positions
    ]
    return [
        ShapedImage(
            f"ILSVRC2012_val_{official:08}.JPEG",
            label,
            _encode(positions[label], number, broken, seed, 1),
        )
        for number, (official, label) in enumerate(numbered[:count])
    ]


def _encode(position: int, number: int, broken: bool, seed: int, split: int) -> bytes:
    """A file whose content depends on its class, and on chance."""
    if broken and number == BROKEN:
        return b"\xff\xd8\xff\xe0 this is no JPEG"
    random = np.random.default_rng([seed, split, number])
    height, width = random.integers(30, 121, 2)
    red, green, blue = position & 1, position >> 1 & 1, position >> 2 & 1
    pixels = np.full((height, width, 3), 24 * position, float)
    pixels += 60 * np.array([red, green, blue])
    pixels += np.linspace(-20, 20, width)[:, np.newaxis] * random.uniform(-1, 1)
    pixels += random.normal(0, 8, pixels.shape)
    image = PIL.Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    buffer = io.BytesIO()
    if number == PNG:
        image.save(buffer, "png")
    elif number % 10 in GREY_REMAINDERS:
        image.convert("L").save(buffer, "jpeg")
    elif number % 10 in CMYK_REMAINDERS:
        image.convert("CMYK").save(buffer, "jpeg")
    else:
        image.save(buffer, "jpeg", quality=95)
    return buffer.getvalue()


def _lines(name: str) -> list[str]:
    """The lines of a file that TFDS has about ImageNet."""
    import tensorflow_datasets as tfds

    return tfds.core.tfds_path(f"datasets/imagenet2012/{name}").read_text().split()
