import numpy as np
import pytest

from experiments.data import cluttered_digits
from experiments.data.cluttered_digits import ClutteredDigits, load_cluttered_digits
from experiments.data.image_set import load_image_set
from experiments.data.splits import Augmentation

AUGMENTATION = Augmentation(image_size=40, min_area=1.0, flip=False, crop_fraction=1.0)
PLACES = 40 - 28 + 1  # of a digit, along each side


def make_digits(num_examples: int = 1_000) -> np.ndarray:
    return np.zeros((num_examples, 28, 28), np.uint8)


def make_split(digits: np.ndarray, **augmentation) -> ClutteredDigits:
    labels = np.arange(len(digits), dtype=np.int32) % 10
    return ClutteredDigits(digits, labels, AUGMENTATION._replace(**augmentation))


def compose(split: ClutteredDigits, seed: int, index: int = 0) -> np.ndarray:
    return split.training_example(index, np.random.default_rng(seed)).images


def noisy_digits(num_examples: int = 20) -> np.ndarray:
    random = np.random.default_rng(0)
    return random.integers(0, 256, (num_examples, 28, 28), dtype=np.uint8)


@pytest.fixture
def noiseless(monkeypatch):
    monkeypatch.setattr(cluttered_digits, "NOISE", 0)


def painted(image: np.ndarray) -> np.ndarray:
    """Where a noiseless image shows something; its commonest colour is background."""
    colours, counts = np.unique(image.reshape(-1, 3), axis=0, return_counts=True)
    return (image != colours[counts.argmax()]).any(axis=-1)


def test_an_image_depends_on_the_generator_alone():
    split = make_split(noisy_digits())
    image = compose(split, 3)
    assert image.shape == (40, 40, 3)
    assert image.dtype == np.uint8
    compose(split, 4)
    np.random.default_rng(5).random()
    np.testing.assert_array_equal(compose(split, 3), image)
    np.testing.assert_array_equal(compose(make_split(noisy_digits()), 3), image)
    assert (compose(split, 4) != image).mean() > 0.5


def test_the_label_is_that_of_the_digit():
    split = make_split(noisy_digits(13))
    random = np.random.default_rng(0)
    for index in range(13):
        assert split.training_example(index, random).label == index % 10
        assert split.evaluation_example(index, 1).label == index % 10


@pytest.mark.usefixtures("noiseless")
def test_the_whole_digit_is_there_anywhere():
    digits = make_digits()
    # All four edges, and no symmetry; the other digits, and so the clutter, are empty.
    digits[7, :, 0] = digits[7, 27, :20] = digits[7, 0, :] = digits[7, 3:9, 27] = 255
    split = make_split(digits)
    places = set()
    for seed in range(300):
        image = compose(split, seed, index=7)
        rows, columns = (np.flatnonzero(painted(image).any(axis=a)) for a in (1, 0))
        top, left = rows[0], columns[0]
        shown = painted(image)[top : top + 28, left : left + 28]
        np.testing.assert_array_equal(shown, digits[7] > 0)
        assert painted(image).sum() == (digits[7] > 0).sum()
        assert len(np.unique(image[painted(image)], axis=0)) == 1
        places.add((top, left))
    for coordinate in zip(*places, strict=True):
        assert set(coordinate) == set(range(PLACES))


@pytest.mark.usefixtures("noiseless")
def test_the_digit_lies_on_top_of_the_clutter():
    digits = np.full((50, 28, 28), 255, np.uint8)
    for seed in range(20):
        image = compose(make_split(digits, image_size=28), seed)
        assert len(np.unique(image.reshape(-1, 3), axis=0)) == 1


@pytest.mark.usefixtures("noiseless")
def test_a_faint_stroke_mixes_its_colour_with_the_background(monkeypatch):
    monkeypatch.setattr(cluttered_digits, "BACKGROUND", (100, 100))
    monkeypatch.setattr(cluttered_digits, "FOREGROUND", (200, 200))
    digits = make_digits()
    digits[0] = 51  # of 255: a fifth
    image = compose(make_split(digits, image_size=28), 0)
    assert set(np.unique(image)) <= {119, 120}


@pytest.mark.usefixtures("noiseless")
def test_clutter_is_three_fragments_of_other_digits():
    digits = np.full((1_000, 28, 28), 255, np.uint8)
    digits[0] = 0
    split = make_split(digits, image_size=64)
    areas, colours = [], []
    for seed in range(60):
        image = compose(split, seed)
        clutter = image[painted(image)]
        areas.append(len(clutter))
        colours.append(len(np.unique(clutter, axis=0)))
    # Of 8 x 8 pixels each, which now and then overlap.
    assert max(areas) == 3 * 8 * 8
    assert min(areas) > 8 * 8
    assert np.mean(np.array(areas) == 3 * 8 * 8) > 0.7
    assert max(colours) == 3
    assert np.mean(np.array(colours) == 3) > 0.9


@pytest.mark.usefixtures("noiseless")
@pytest.mark.parametrize("corner", [0, 27])
def test_fragments_come_from_everywhere(corner):
    digits = make_digits(50)
    digits[1:, corner, corner] = 255
    split = make_split(digits)
    # A fragment shows a given corner once in 21 * 21 times.
    shown = [painted(compose(split, seed)).sum() for seed in range(1_000)]
    assert 1 <= sum(shown) <= 20


@pytest.mark.usefixtures("noiseless")
def test_colours_are_dark_behind_and_light_before():
    empty = make_split(make_digits())
    full = make_split(np.full((9, 28, 28), 255, np.uint8), image_size=28)
    for split, low, high in ((empty, 0, 100), (full, 120, 255)):
        colours = np.array([compose(split, seed)[0, 0] for seed in range(300)])
        assert low <= colours.min() < low + 3
        assert high - 3 < colours.max() <= high
        # Channels are independent.
        assert (np.abs(np.corrcoef(colours.T)[np.triu_indices(3, 1)]) < 0.2).all()


def test_noise(monkeypatch):
    monkeypatch.setattr(cluttered_digits, "BACKGROUND", (120, 120))
    image = compose(make_split(make_digits(), image_size=64), 0)
    assert image.std() == pytest.approx(16, rel=0.03)
    # Fractions are cut off.
    assert image.mean() == pytest.approx(119.5, abs=0.6)
    assert abs(np.corrcoef(image[..., 0].flat, image[..., 1].flat)[0, 1]) < 0.1


def test_values_stay_in_range():
    """Noise that went beyond black or white would wrap around."""
    split = make_split(make_digits(), image_size=64)
    darkest = min((compose(split, seed) for seed in range(40)), key=np.mean)
    assert (darkest == 0).mean() > 0.1
    assert darkest.max() < 200


def test_test_images_are_the_same_every_time():
    digits = noisy_digits()
    split, other = make_split(digits), make_split(digits)
    first = [split.evaluation_example(index, 1).images for index in range(5)]
    for index in reversed(range(5)):
        compose(other, index)
        found = other.evaluation_example(index, 1).images
        np.testing.assert_array_equal(found, first[index])
    # Two images of one digit would differ in more than their digit.
    assert (first[0] != first[1]).mean() > 0.5


@pytest.mark.parametrize(
    ("crops", "flip", "number"),
    [
        (1, False, 1),
        (10, False, 5),
        (144, False, 72),
        (1, True, 1),
        (10, True, 10),
        (144, True, 144),
    ],
)
def test_crops(crops, flip, number):
    split = make_split(noisy_digits(), flip=flip)
    images = split.evaluation_example(2, crops).images
    assert images.shape == (number, 40, 40, 3)
    assert images.dtype == np.uint8


def test_one_crop_is_the_whole_image():
    digits = make_digits()
    digits[0, [0, 27], :] = digits[0, :, [0, 27]] = 255
    split = make_split(digits, image_size=28)
    (image,) = split.evaluation_example(0, 1).images
    edge = image[digits[0] > 0].astype(int)
    assert (edge == edge[0]).all()


@pytest.mark.parametrize(
    ("num_examples", "lengths"),
    [(20, (20,)), (500, (500,)), (1_000, (500, 500)), (1_203, (500, 500, 203))],
)
def test_shards(num_examples, lengths):
    assert make_split(make_digits(num_examples)).shard_lengths == lengths


def test_the_bundled_digits():
    train, test = load_cluttered_digits(AUGMENTATION)
    data = load_image_set("mnist")
    assert (len(train), len(test)) == (60_000, 10_000)
    assert train.num_classes == test.num_classes == 10
    random = np.random.default_rng(0)
    for index in (0, 1, 59_999):
        example = train.training_example(index, random)
        assert example.label == data.train_labels[index]
        assert isinstance(example.label, int)
    for index in (0, 1, 9_999):
        assert test.evaluation_example(index, 1).label == data.test_labels[index]
    assert sum(test.shard_lengths) == 10_000
