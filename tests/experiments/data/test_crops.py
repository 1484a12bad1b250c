import io
import itertools

import cv2
import numpy as np
import PIL.Image
import pytest

from experiments.data import crops
from experiments.data.crops import evaluation_crops, training_crop
from experiments.data.splits import Augmentation, UndecodableError


def coordinates(height: int, width: int) -> np.ndarray:
    """An image whose red is x and whose green is y."""
    rows, columns = np.indices((height, width), np.uint8)
    return np.stack([columns, rows, np.full_like(rows, 77)], axis=-1)


def encode(image: np.ndarray, form: str = "png") -> bytes:
    buffer = io.BytesIO()
    options = {"quality": 95} if form == "jpeg" else {}
    PIL.Image.fromarray(image).save(buffer, form, **options)
    return buffer.getvalue()


def augment(size: int = 32, min_area: float = 0.08, flip: bool = False) -> Augmentation:
    return Augmentation(size, min_area, flip, crop_fraction=0.8)


def expected_view(
    image_size: tuple[int, int], top: float, left: float, step: float, size: int
) -> np.ndarray:
    """What `coordinates` shows from (top, left) on, a pixel for each step."""
    ends = np.array(image_size) - 1
    places = (np.arange(size) + 0.5) * step - 0.5
    rows = np.clip(top + places, 0, ends[0])
    columns = np.clip(left + places, 0, ends[1])
    columns, rows = np.broadcast_arrays(columns, rows[:, None])
    return np.stack([columns, rows, np.full_like(rows, 77)], axis=-1)


# The shorter side is 40 pixels, round(32 / 0.8): as large as it is to be.
LANDSCAPE, PORTRAIT = (40, 60), (60, 40)
FIVE = {
    LANDSCAPE: [(0, 0), (0, 28), (8, 0), (8, 28), (4, 14)],
    PORTRAIT: [(0, 0), (0, 8), (28, 0), (28, 8), (14, 4)],
}


@pytest.mark.parametrize("shape", [LANDSCAPE, PORTRAIT])
def test_one_crop_is_the_centre(shape):
    (crop,) = evaluation_crops(coordinates(*shape), augment(flip=True), 1)
    top, left = FIVE[shape][-1]
    expected = coordinates(*shape)[top : top + 32, left : left + 32]
    np.testing.assert_array_equal(crop, expected)
    assert crop.dtype == np.uint8


@pytest.mark.parametrize("shape", [LANDSCAPE, PORTRAIT])
def test_ten_crops_are_corners_and_centre_and_their_mirror_images(shape):
    views = evaluation_crops(coordinates(*shape), augment(flip=True), 10)
    assert views.shape == (10, 32, 32, 3)
    for i, (top, left) in enumerate(FIVE[shape]):
        expected = coordinates(*shape)[top : top + 32, left : left + 32]
        np.testing.assert_array_equal(views[i], expected)
        np.testing.assert_array_equal(views[5 + i], expected[:, ::-1])


@pytest.mark.parametrize("shape", [LANDSCAPE, PORTRAIT])
def test_144_crops_are_where_the_paper_has_them(shape):
    views = evaluation_crops(coordinates(*shape), augment(flip=True), 144)
    assert views.shape == (144, 32, 32, 3)
    expected = []
    for shorter, longer in ((40, 60), (45, 68), (50, 75), (55, 82)):
        step, margin = 40 / shorter, shorter - 32
        for start in (0, (longer - shorter) / 2, longer - shorter):
            places = [(0, 0), (0, margin), (margin, 0), (margin, margin)]
            places.append((margin / 2, margin / 2))
            down, across = (0, start) if shape == LANDSCAPE else (start, 0)
            for top, left in places:
                place = (top + down) * step, (left + across) * step
                expected.append(expected_view(shape, *place, step, 32))
            place = down * step, across * step
            expected.append(expected_view(shape, *place, 40 / 32, 32))
    # A square and its centre are each moved to whole pixels, and colours are rounded.
    np.testing.assert_allclose(views[:72], np.stack(expected), atol=2)
    np.testing.assert_array_equal(views[72:], views[:72, :, ::-1])


def test_144_crops_of_a_scale_that_needs_no_resizing():
    views = evaluation_crops(coordinates(*LANDSCAPE), augment(), 144)
    starts = [views[i, 0, 0, :2].tolist() for i in range(18) if i % 6 != 5]
    left = [[0, 0], [8, 0], [0, 8], [8, 8], [4, 4]]
    centre = [[10, 0], [18, 0], [10, 8], [18, 8], [14, 4]]
    right = [[20, 0], [28, 0], [20, 8], [28, 8], [24, 4]]
    assert starts == left + centre + right


def test_the_scales_of_imagenet(monkeypatch):
    lengths = []
    original = crops._resize

    def resize(image, height, width):
        lengths.append((height, width))
        return original(image, height, width)

    monkeypatch.setattr(crops, "_resize", resize)
    image = np.zeros((512, 1024, 3), np.uint8)
    evaluation_crops(image, Augmentation(224, 0.08, True, 0.875), 144)
    scales = [(256, 512), (288, 576), (320, 640), (352, 704)]
    assert [pair for pair in lengths if pair != (224, 224)] == scales


@pytest.mark.parametrize(("crop_count", "unmirrored"), [(1, 1), (10, 5), (144, 72)])
def test_without_flip_there_are_no_mirror_images(crop_count, unmirrored):
    image = coordinates(50, 70)
    views = evaluation_crops(image, augment(flip=False), crop_count)
    assert len(views) == unmirrored
    mirrored = evaluation_crops(image, augment(flip=True), crop_count)
    np.testing.assert_array_equal(views, mirrored[:unmirrored])


@pytest.mark.parametrize("shape", [(32, 32), (7, 90), (500, 3), (1, 1)])
@pytest.mark.parametrize("crop_fraction", [0.8, 1])
def test_crops_of_any_shape(shape, crop_fraction):
    augmentation = Augmentation(32, 0.08, True, crop_fraction)
    image = np.full((*shape, 3), (1, 2, 3), np.uint8)
    for crop_count in (1, 10, 144):
        views = evaluation_crops(image, augmentation, crop_count)
        assert views.shape == (crop_count, 32, 32, 3)
        np.testing.assert_array_equal(views, np.broadcast_to((1, 2, 3), views.shape))


@pytest.mark.parametrize("crop_count", [0, 5, 12])
def test_another_number_of_crops(crop_count):
    with pytest.raises(ValueError, match=f"crops is {crop_count}: .* 1, 10, 144;"):
        evaluation_crops(coordinates(40, 60), augment(), crop_count)


def test_shrinking_a_little_is_bilinear():
    row = np.tile(np.array([0, 90, 240], np.uint8), 16)
    image = np.broadcast_to(row[:, None], (48, 48, 3))
    (crop,) = evaluation_crops(image, Augmentation(32, 1, False, 1), 1)
    # The centres of two pixels lie at 1/4 and 7/4 of those of three.
    expected = np.tile([0.25 * 90, 0.25 * 90 + 0.75 * 240], 16)
    np.testing.assert_allclose(crop[0, :, 0], expected, atol=1)


@pytest.mark.parametrize("axis", [0, 1])
def test_shrinking_to_less_than_half_skips_no_pixel(axis):
    image = np.zeros((96, 96, 3), np.uint8)
    # Every row or column that bilinear interpolation would look at.
    image.swapaxes(0, axis)[1::3] = 240
    (crop,) = evaluation_crops(image, Augmentation(32, 1, False, 1), 1)
    np.testing.assert_allclose(crop, 80, atol=1)
    narrow = image.swapaxes(0, axis)[:, :32].swapaxes(0, axis)
    crop = training_crop(encode(narrow), augment(32, 1), np.random.default_rng(0))
    np.testing.assert_allclose(crop, 80, atol=1)


def find_box(crop: np.ndarray) -> np.ndarray:
    """The top, left, height and width of an unmirrored crop of `coordinates`."""
    starts, ends = crop[0, 0, 1::-1].astype(int), crop[-1, -1, 1::-1].astype(int)
    size = len(crop)
    # The first and the last pixel's centres lie half a step within the box.
    lengths = (ends - starts) * size / (size - 1)
    return np.concatenate([(ends + starts + 1) / 2 - lengths / 2, lengths])


@pytest.fixture(scope="module")
def boxes() -> np.ndarray:
    """Of crops of an image of 180x240 pixels, at least 0.2 of its area."""
    encoded = encode(coordinates(180, 240))
    draws = (np.random.default_rng([7, i]) for i in range(1500))
    return np.array(
        [find_box(training_crop(encoded, augment(64, 0.2), draw)) for draw in draws]
    )


def test_training_crops_lie_in_the_image(boxes):
    top, left, height, width = boxes.T
    assert min(top.min(), left.min()) > -1.5
    assert (top + height).max() < 181.5
    assert (left + width).max() < 241.5


def test_training_crops_have_random_areas_and_aspect_ratios(boxes):
    _, _, height, width = boxes.T
    areas, ratios = height * width / (180 * 240), np.log(width / height) / np.log(4 / 3)
    assert 0.18 < areas.min() < 0.22
    assert 0.95 < areas.max() < 1.03
    # Up to an area of 135 x 180 every aspect ratio fits: nothing was tried again.
    fits = areas < 0.56
    quantiles = np.quantile(areas[fits], [0.25, 0.5, 0.75])
    np.testing.assert_allclose(quantiles, [0.29, 0.38, 0.47], atol=0.02)
    quantiles = np.quantile(ratios[fits], [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(quantiles, [-1, -0.5, 0, 0.5, 1], atol=0.08)


def test_training_crops_lie_anywhere(boxes):
    top, left, height, width = boxes.T
    movable = (height < 150) & (width < 200)
    for start, room in ((top, 180 - height), (left, 240 - width)):
        shares = start[movable] / room[movable]
        quantiles = np.quantile(shares, [0.01, 0.25, 0.5, 0.75, 0.99])
        np.testing.assert_allclose(quantiles, [0, 0.25, 0.5, 0.75, 1], atol=0.06)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((30, 250), (0, 105, 30, 40)), ((250, 30), (105, 0, 40, 30))],
)
def test_the_largest_centred_part_where_no_other_fits(shape, expected):
    crop = training_crop(
        encode(coordinates(*shape)), augment(32, 0.9), np.random.default_rng(0)
    )
    np.testing.assert_allclose(find_box(crop), expected, atol=1.5)


def test_all_of_an_image():
    everything = augment(32, min_area=1)
    random = np.random.default_rng(0)
    square, wide = coordinates(32, 32), coordinates(96, 192)
    crop = training_crop(encode(square), everything, random)
    np.testing.assert_array_equal(crop, square)
    crop = training_crop(encode(wide), everything, random)
    np.testing.assert_allclose(find_box(crop), (0, 0, 96, 192), atol=1.5)


def test_half_of_the_crops_are_mirrored():
    image = coordinates(32, 32)
    mirrored = []
    for i in range(400):
        random = np.random.default_rng([3, i])
        crop = training_crop(encode(image), augment(32, 1, flip=True), random)
        mirrored.append(crop[0, 0, 0] != 0)
        expected = image[:, ::-1] if mirrored[-1] else image
        np.testing.assert_array_equal(crop, expected)
    assert 160 < sum(mirrored) < 240  # four standard deviations


def test_draws_depend_on_the_size_alone():
    image = coordinates(100, 120)
    for i in range(20):
        one, same, other = (
            training_crop(encoded, augment(flip=True), np.random.default_rng(seed))
            for encoded, seed in (
                (encode(image), i),
                (encode(255 - image), i),
                (encode(image), i + 1),
            )
        )
        np.testing.assert_allclose(one, 255 - same.astype(int), atol=1)
        assert (one != other).any()


@pytest.mark.parametrize("shape", [(601, 800), (800, 600)])
def test_large_parts_are_decoded_at_lower_resolution(shape, monkeypatch):
    rows, columns = np.indices(shape)
    image = np.stack([columns * 255 / 800, rows * 255 / 800, rows * 0], axis=-1)
    encoded = encode(image.astype(np.uint8), "jpeg")
    decode, sizes = crops.decode, []

    def decode_fully(encoded, at_least):
        sizes.append(min(decode(encoded, at_least).shape[:2]))
        return decode(encoded)

    for i in range(20):
        crop = training_crop(encoded, augment(48, 0.2), np.random.default_rng(i))
        with monkeypatch.context() as patch:
            patch.setattr(crops, "decode", decode_fully)
            full = training_crop(encoded, augment(48, 0.2), np.random.default_rng(i))
        crop, full = crop[..., :2].astype(int), full[..., :2].astype(int)
        one_pixel = (full[-1, -1] - full[0, 0]) / 47
        assert one_pixel.min() > 1
        # The box is moved by half a pixel of the smaller image at most.
        assert (np.abs(crop - full).mean((0, 1)) / one_pixel).max() < 0.5
    assert min(sizes) == min(shape) // 8 + (min(shape) % 8 > 0)
    assert len(set(sizes)) > 1


def test_a_reduced_part_has_the_resolution_that_is_wanted(monkeypatch):
    encoded = encode(np.zeros((600, 800, 3), np.uint8), "jpeg")
    resize, shapes = crops._resize, []

    def record(image, height, width):
        shapes.append(image.shape[:2])
        return resize(image, height, width)

    monkeypatch.setattr(crops, "_resize", record)
    for i in range(100):
        training_crop(encoded, augment(48, 0.05), np.random.default_rng(i))
    shorter = np.array(shapes).min(axis=1)
    assert shorter.min() >= 47
    assert shorter.max() < 2 * 49


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_training_crops_of_other_colours(mode):
    buffer = io.BytesIO()
    PIL.Image.new(mode, (70, 50)).save(buffer, "jpeg")
    crop = training_crop(buffer.getvalue(), augment(), np.random.default_rng(0))
    assert crop.shape == (32, 32, 3)
    assert crop.dtype == np.uint8


def test_undecodable():
    encoded = encode(coordinates(50, 70), "jpeg")
    for broken in (b"", encoded[:-30]):
        with pytest.raises(UndecodableError):
            training_crop(broken, augment(), np.random.default_rng(0))


def test_opencv_starts_no_threads():
    assert cv2.getNumThreads() == 1


def test_nothing_is_shared_with_the_image():
    image = coordinates(*LANDSCAPE)
    for crop_count, flip in itertools.product((1, 10, 144), (False, True)):
        views = evaluation_crops(image, augment(flip=flip), crop_count)
        assert not np.shares_memory(views, image)
        assert views.flags.c_contiguous
