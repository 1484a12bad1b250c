"""Crops of images: random ones to train with, and fixed ones to evaluate with."""

import math
from collections.abc import Callable

import cv2
import numpy as np

from experiments.data.decoding import decode, image_size
from experiments.data.splits import Augmentation

# Every core has a worker process; OpenCV's own threads would only compete with them.
cv2.setNumThreads(0)

_WIDEST = 4 / 3  # aspect ratio of a training crop; 3 / 4 is the narrowest
_ATTEMPTS = 10

_SCALES = (1, 9 / 8, 10 / 8, 11 / 8)  # 256, 288, 320 and 352 for crops of 224

_Views = list[np.ndarray]


def training_crop(
    encoded: bytes, augmentation: Augmentation, random: np.random.Generator
) -> np.ndarray:
    """Decodes a random part of an image.

    As the paper of GoogLeNet describes it: the part's share of the area is uniform in
    [min_area, 1], its aspect ratio is between 3/4 and 4/3, log-uniform here so that
    wide and high are equally likely, and its place is uniform. If it does not fit in
    the image ten times, the largest centred part of an allowed aspect ratio is taken.
    With a min_area of 1 it is the whole image, whatever its aspect ratio.

    Args:
      encoded: a JPEG or PNG file.
      augmentation: image_size, min_area and flip are used.
      random: where the draws come from. They depend on nothing else but the size of
        the image.

    Returns:
      uint8 (image_size, image_size, 3), RGB.

    Raises:
      UndecodableError: if the image cannot be decoded.
    """
    height, width = image_size(encoded)
    top, left, box_height, box_width = _choose_box(
        height, width, augmentation.min_area, random
    )
    # A part of twice the size that is wanted needs half of the resolution.
    enlarged = min(height, width) / min(box_height, box_width)
    image = decode(encoded, math.ceil(augmentation.image_size * enlarged))
    factor = round(height / image.shape[0])  # 1, 2, 4 or 8
    box = image[
        round(top / factor) : round((top + box_height) / factor),
        round(left / factor) : round((left + box_width) / factor),
    ]
    crop = _resize(box, augmentation.image_size, augmentation.image_size)
    if augmentation.flip and random.random() < 0.5:
        crop = cv2.flip(crop, 1)
    return crop


def evaluation_crops(
    image: np.ndarray, augmentation: Augmentation, crops: int
) -> np.ndarray:
    """Cuts an image into the fixed crops that a prediction is averaged over.

    With size = image_size and scale = round(size / crop_fraction):

    - 1: the shorter side is resized to scale; the centre is taken.
    - 10: at that scale the four corners (top left, top right, bottom left, bottom
      right) and the centre of the image, then the mirror images of these five.
    - 144: the paper's. For each of four scales (1, 9/8, 10/8 and 11/8 times scale),
      for each of three squares as large as the shorter side (left, centre, right; or
      top, centre, bottom), six views: the square's four corners and centre, and the
      square itself resized to size. Then the mirror images of these 72.

    Where images must not be mirrored (flip is False), the second half of 10 and 144
    is left out, and 5 or 72 crops are returned.

    Args:
      image: the whole image, uint8 (height, width, 3).
      augmentation: image_size, flip and crop_fraction are used.
      crops: 1, 10 or 144.

    Returns:
      uint8 (crops, image_size, image_size, 3), or half of 10 or 144.

    Raises:
      ValueError: if crops is another number.
    """
    if crops not in _VIEWS:
        raise ValueError(
            f"crops is {crops}: expected one of {', '.join(map(str, _VIEWS))}; "
            "choose one of these"
        )
    size = augmentation.image_size
    views = np.stack(_VIEWS[crops](image, size, size / augmentation.crop_fraction))
    if crops > 1 and augmentation.flip:
        views = np.concatenate([views, views[:, :, ::-1]])
    return views


def _choose_box(
    height: int, width: int, min_area: float, random: np.random.Generator
) -> tuple[int, int, int, int]:
    """Returns the top, left, height and width of a training crop."""
    if min_area == 1:
        return 0, 0, height, width
    for _ in range(_ATTEMPTS):
        area = height * width * random.uniform(min_area, 1)
        ratio = _WIDEST ** random.uniform(-1, 1)
        box_height = round(math.sqrt(area / ratio))
        box_width = round(math.sqrt(area * ratio))
        if 0 < box_height <= height and 0 < box_width <= width:
            top = int(random.integers(height - box_height + 1))
            left = int(random.integers(width - box_width + 1))
            return top, left, box_height, box_width
    box_height = min(height, round(width * _WIDEST))
    box_width = min(width, round(height * _WIDEST))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def _resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear interpolation; an average over areas where that would skip pixels.

    Bilinear interpolation looks at 2x2 pixels, which are all of them for as long as an
    image shrinks to no less than half. Areas take ten times the time.
    """
    skips = image.shape[0] > 2 * height or image.shape[1] > 2 * width
    interpolation = cv2.INTER_AREA if skips else cv2.INTER_LINEAR
    return cv2.resize(image, (width, height), interpolation=interpolation)


def _resize_shorter_side(image: np.ndarray, length: float) -> np.ndarray:
    height, width = image.shape[:2]
    factor = round(length) / min(height, width)
    return _resize(image, round(height * factor), round(width * factor))


def _centre(image: np.ndarray, size: int) -> np.ndarray:
    top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    return image[top : top + size, left : left + size]


def _corners_and_centre(image: np.ndarray, size: int) -> _Views:
    bottom, right = image.shape[0] - size, image.shape[1] - size
    corners = [(0, 0), (0, right), (bottom, 0), (bottom, right)]
    views = [image[top : top + size, left : left + size] for top, left in corners]
    return [*views, _centre(image, size)]


def _squares(image: np.ndarray) -> _Views:
    """The two ends and the middle of the longer side."""
    side = min(image.shape[:2])
    return [image[:side, :side], _centre(image, side), image[-side:, -side:]]


def _one_view(image: np.ndarray, size: int, scale: float) -> _Views:
    return [_centre(_resize_shorter_side(image, scale), size)]


def _five_views(image: np.ndarray, size: int, scale: float) -> _Views:
    return _corners_and_centre(_resize_shorter_side(image, scale), size)


def _seventy_two_views(image: np.ndarray, size: int, scale: float) -> _Views:
    views = []
    for factor in _SCALES:
        for square in _squares(_resize_shorter_side(image, scale * factor)):
            views += [*_corners_and_centre(square, size), _resize(square, size, size)]
    return views


_VIEWS: dict[int, Callable[[np.ndarray, int, float], _Views]] = {
    1: _one_view,
    10: _five_views,  # and mirrored
    144: _seventy_two_views,  # and mirrored
}
