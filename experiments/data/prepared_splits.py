"""Examples of sets that TFDS has prepared, of any size, read when they are needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import google_crc32c
import numpy as np

from experiments.data.crops import evaluation_crops, training_crop
from experiments.data.decoding import decode, image_size
from experiments.data.file_feed import first_decodable
from experiments.data.metadata import (
    Features,
    choose_features,
    choose_splits,
    parse_example,
    read_info,
)
from experiments.data.records import Records
from experiments.data.splits import Augmentation, Example, Split, UndecodableError

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

    from experiments.data.device_augmentation import DeviceExamples

SAMPLE = 64  # records that the checksum of a split is of


def load_prepared_splits(
    name: str, data_dir: str | None, augmentation: Augmentation
) -> tuple[Split, Split]:
    """Opens a prepared set: its train split, and its test or else validation split.

    Args:
      name: the TFDS name, as `metadata.read_info` takes it: `"imagenet2012"`,
        `"imagenet_resized/64x64"`. Its images may be of any size, grey or in colour.
      data_dir: the directory that holds prepared sets, or None for TFDS's default. A
        bucket's may do, but one that is mounted as a directory is read faster.
      augmentation: how images become what the network sees.

    Returns:
      The splits, which read and decode an example when it is asked for. Validation
      takes the place of a test split whose labels are secret, as ImageNet's are.

    Raises:
      DataError: if the set is unknown, not prepared, or lacks a split; if it is no
        image classification set; if a record file is missing, truncated or of another
        form, or holds another number of examples than the metadata say.
    """
    info = read_info(name, data_dir)
    features = choose_features(name, info)
    train, test = choose_splits(name, info, features)
    return (
        _PreparedSplit(info, train, features, augmentation),
        _PreparedSplit(info, test, features, augmentation),
    )


class _PreparedSplit:
    """One split; a Split."""

    def __init__(
        self,
        info: tfds.core.DatasetInfo,
        split: tfds.core.SplitInfo,
        features: Features,
        augmentation: Augmentation,
    ) -> None:
        self.num_classes = features.num_classes
        self.shard_lengths = split.shard_lengths
        self._records = Records(
            split.filepaths, split.shard_lengths, info.file_format.value
        )
        self._features = features
        self._augmentation = augmentation

    def __len__(self) -> int:
        return len(self._records)

    @property
    def checksum(self) -> str:
        indices = np.linspace(0, len(self) - 1, min(len(self), SAMPLE), dtype=int)
        sample = b"".join(self._records[int(index)] for index in indices)
        return f"{google_crc32c.value(sample):08x}"

    @property
    def device_bytes(self) -> int | None:
        height, width, _ = self._features.image_shape
        if height is None or width is None:
            return None
        return len(self) * height * width * 3

    def device_examples(self, report: Callable[[str], None]) -> DeviceExamples:
        from experiments.data.device_augmentation import of_images

        images: list[np.ndarray] = []
        labels = []
        for index in range(len(self)):
            example, broken = first_decodable(self, index, self._whole)
            for message in broken:
                report(message)
            images.append(example.images)
            labels.append(example.label)
        return of_images(
            np.stack(images), np.array(labels, np.int32), self._augmentation
        )

    def _whole(self, index: int) -> Example:
        return self._make(index, self._decode_to_shape)

    def _decode_to_shape(self, encoded: bytes) -> np.ndarray:
        size, expected = image_size(encoded), self._features.image_shape[:2]
        if size != expected:
            raise UndecodableError(
                f"it has {size[0]}x{size[1]} pixels, expected "
                f"{expected[0]}x{expected[1]} as its features.json says"
            )
        return decode(encoded)

    def training_example(self, index: int, random: np.random.Generator) -> Example:
        return self._make(
            index, lambda image: training_crop(image, self._augmentation, random)
        )

    def evaluation_example(self, index: int, crops: int) -> Example:
        return self._make(
            index,
            lambda image: evaluation_crops(decode(image), self._augmentation, crops),
        )

    def _make(self, index: int, crop: Callable[[bytes], np.ndarray]) -> Example:
        """Reads an example; whatever is wrong with it, the message names it."""
        file_name = ""
        try:
            stored = parse_example(self._records[index], self._features)
            file_name = stored.file_name and f" ({stored.file_name})"
            if not 0 <= stored.label < self.num_classes:
                raise UndecodableError(
                    f"its label is {stored.label}, expected 0 to {self.num_classes - 1}"
                )
            return Example(crop(stored.image), stored.label)
        except UndecodableError as error:
            raise UndecodableError(
                f"{self._records.describe(index)}{file_name}: {error}"
            ) from None
