import threading
from collections.abc import Collection

import numpy as np
import pytest

from experiments.data.batches import batch_indices
from experiments.data.errors import DataError
from experiments.data.loader import (
    BATCHES_AHEAD,
    MAX_SUCCESSORS,
    UndecodableImages,
    evaluation_batches,
    training_batches,
)
from experiments.data.splits import Example, UndecodableError


class NumberedSplit:
    """Images of two pixels: the example's number, and a random one."""

    num_classes = 10
    shard_lengths = (10, 10, 10)

    def __init__(self, broken: Collection[int] = (), fatal: int | None = None) -> None:
        self.requested: list[int] = []
        self._broken, self._fatal = broken, fatal

    def __len__(self) -> int:
        return 30

    def training_example(self, index: int, random: np.random.Generator) -> Example:
        self._check(index)
        number = random.integers(0, 256)
        return Example(np.array([index, number], np.uint8), index % 10)

    def evaluation_example(self, index: int, crops: int) -> Example:
        self._check(index)
        return Example(np.full((crops, 2), index, np.uint8), index % 10)

    def _check(self, index: int) -> None:
        self.requested.append(index)
        if index == self._fatal:
            raise DataError(f"file of {index} is truncated")
        if index in self._broken:
            raise UndecodableError(f"image {index} is broken")


def train(split, steps=range(8), **options):
    defaults = {
        "seed": 3,
        "batch_size": 6,
        "shuffle": "examples",
        "threads": 3,
        "undecodable": UndecodableImages(100),
    }
    return training_batches(split, steps, **(defaults | options))


def evaluate(split, num_examples=30, **options):
    defaults = {
        "batch_size": 8,
        "crops": 2,
        "threads": 3,
        "undecodable": UndecodableImages(100),
    }
    return list(evaluation_batches(split, num_examples, **(defaults | options)))


def expected_indices(steps, shards=None) -> np.ndarray:
    return batch_indices([3], steps[0], len(steps), 30, 6, shards)[:, 0]


def assert_same(found, expected) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        for field in one._fields:
            np.testing.assert_array_equal(getattr(one, field), getattr(other, field))


def loader_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("images")]


@pytest.mark.parametrize("shuffle", ["examples", "shards"])
def test_examples_order_and_augmentation_are_as_documented(shuffle):
    steps = range(2, 9)
    shards = NumberedSplit.shard_lengths if shuffle == "shards" else None
    batches = list(train(NumberedSplit(), steps, shuffle=shuffle))
    for step, batch, indices in zip(
        steps, batches, expected_indices(steps, shards), strict=True
    ):
        assert batch.images.dtype == np.uint8
        assert batch.images.shape == (6, 2)
        assert batch.labels.dtype == np.int32
        assert batch.mask.dtype == bool
        assert batch.mask.all()
        np.testing.assert_array_equal(batch.images[:, 0], indices)
        np.testing.assert_array_equal(batch.labels, indices % 10)
        draws = [
            np.random.default_rng([3, step, position]).integers(0, 256)
            for position in range(6)
        ]
        np.testing.assert_array_equal(batch.images[:, 1], draws)


@pytest.mark.parametrize("threads", [1, 8])
@pytest.mark.parametrize("first", [0, 1, 5, 7])
def test_a_batch_depends_on_seed_and_step_alone(first, threads):
    whole = list(train(NumberedSplit()))
    rest = list(train(NumberedSplit(), range(first, 8), threads=threads))
    assert_same(rest, whole[first:])
    (other,) = train(NumberedSplit(), range(1), seed=4)
    assert (other.images[:, 0] != whole[0].images[:, 0]).any()
    assert (other.images[:, 1] != whole[0].images[:, 1]).any()


def test_no_steps():
    assert list(train(NumberedSplit(), range(5, 5))) == []


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_parts_make_up_the_whole_batch(count):
    whole = list(train(NumberedSplit({4})))
    parts = [
        list(train(NumberedSplit({4}), part=(number, count))) for number in range(count)
    ]
    joined = [
        type(whole[0])(
            *(np.concatenate(arrays) for arrays in zip(*shares, strict=True))
        )
        for shares in zip(*parts, strict=True)
    ]
    assert_same(joined, whole)


def test_a_part_reads_its_own_examples_alone():
    split = NumberedSplit()
    list(train(split, range(5), part=(1, 2)))
    expected = expected_indices(range(5))[:, 3:]
    assert sorted(split.requested) == sorted(expected.ravel().tolist())


def test_an_undecodable_image_is_replaced_by_the_next_that_works():
    broken = {4, 12, 13, 14, 29}
    successor = {4: 5, 12: 15, 13: 15, 14: 15, 29: 0}
    undecodable = UndecodableImages(5)
    whole = list(train(NumberedSplit(), range(15)))
    batches = list(train(NumberedSplit(broken), range(15), undecodable=undecodable))
    for batch, intact in zip(batches, whole, strict=True):
        expected = [successor.get(int(i), int(i)) for i in intact.images[:, 0]]
        np.testing.assert_array_equal(batch.images[:, 0], expected)
        np.testing.assert_array_equal(batch.labels, np.array(expected) % 10)
        # Trying leaves the augmentation as it is.
        np.testing.assert_array_equal(batch.images[:, 1], intact.images[:, 1])
        assert batch.mask.all()
    # Three epochs met each of them three times.
    assert sorted(undecodable.messages) == sorted(
        f"image {i} is broken" for i in broken
    )


def test_too_many_undecodable_images_end_the_run():
    undecodable = UndecodableImages(2)
    with pytest.raises(DataError, match=r"^more than 2 images cannot be decoded") as e:
        list(train(NumberedSplit({1, 8, 20}), range(15), undecodable=undecodable))
    assert "is broken; restore the data, or raise max_undecodable." in str(e.value)
    assert "\n" not in str(e.value)
    assert not loader_threads()


def test_none_may_be_broken_where_the_limit_is_none():
    with pytest.raises(DataError, match=r"more than 0 images .* image 8 is broken"):
        list(train(NumberedSplit({8}), range(5), undecodable=UndecodableImages(0)))


def test_a_message_counts_once():
    undecodable = UndecodableImages(1)
    for _ in range(3):
        undecodable.add(UndecodableError("this"))
    assert list(undecodable.messages) == ["this"]
    with pytest.raises(DataError, match="the last is: that;"):
        undecodable.add(UndecodableError("that"))


def test_a_set_without_a_single_image_is_given_up():
    with pytest.raises(
        DataError, match=rf"^{MAX_SUCCESSORS} consecutive images, from number "
    ):
        list(train(NumberedSplit(range(30)), range(1)))
    assert not loader_threads()


@pytest.mark.parametrize("num_examples", [30, 24, 9, 8, 3])
def test_evaluation_takes_the_first_examples_in_order(num_examples):
    batches = evaluate(NumberedSplit(), num_examples)
    assert len(batches) == -(-num_examples // 8)
    shown = [batch.images[batch.mask] for batch in batches]
    images = np.concatenate(shown)
    assert images.shape == (num_examples, 2, 2)
    np.testing.assert_array_equal(images[:, 0, 0], np.arange(num_examples))
    labels = np.concatenate([batch.labels[batch.mask] for batch in batches])
    np.testing.assert_array_equal(labels, np.arange(num_examples) % 10)


def test_the_last_batch_is_padded_with_its_own_examples():
    *others, last = evaluate(NumberedSplit(), 19, crops=3)
    assert all(batch.mask.all() for batch in others)
    assert last.mask.tolist() == [True] * 3 + [False] * 5
    expected = [16, 17, 18, 16, 17, 18, 16, 17]
    np.testing.assert_array_equal(last.images[:, 0, 0], expected)
    np.testing.assert_array_equal(last.labels, np.array(expected) % 10)
    assert last.images.shape == (8, 3, 2)
    assert last.labels.dtype == np.int32


def test_evaluation_leaves_undecodable_images_out():
    undecodable = UndecodableImages(100)
    broken = {0, 9, *range(16, 24)}
    batches = evaluate(NumberedSplit(broken), undecodable=undecodable)
    # Of the third batch nothing is left, but every process must see as many batches.
    assert [int(batch.mask.sum()) for batch in batches] == [7, 7, 0, 6]
    images = np.concatenate([batch.images[batch.mask] for batch in batches])
    assert sorted(set(range(30)) - broken) == images[:, 0, 0].tolist()
    assert all(len(batch.mask) == 8 for batch in batches)
    for batch in batches:
        assert not broken & set(batch.images[:, 0, 0].tolist())
        np.testing.assert_array_equal(batch.labels, batch.images[:, 0, 0] % 10)
    assert len(undecodable.messages) == 10
    with pytest.raises(DataError, match="more than 9 images"):
        evaluate(NumberedSplit(broken), undecodable=UndecodableImages(9))


@pytest.mark.parametrize("count", [2, 4])
def test_parts_of_evaluation_make_up_its_batches(count):
    """With padding, and with images that cannot be decoded."""
    split = NumberedSplit({3, 16, 17})
    whole = evaluate(split, 19)
    parts = [evaluate(split, 19, part=(number, count)) for number in range(count)]
    assert all(len(part) == len(whole) for part in parts)
    for batch, *own in zip(whole, *parts, strict=True):
        assert [len(part.mask) for part in own] == [8 // count] * count
        for field, *pieces in zip(batch, *own, strict=True):
            np.testing.assert_array_equal(np.concatenate(pieces), field)


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_threads_change_nothing_in_evaluation(threads):
    assert_same(
        evaluate(NumberedSplit({3}), threads=threads), evaluate(NumberedSplit({3}))
    )


def test_stopping_early_leaves_no_threads_and_little_work():
    split = NumberedSplit()
    batches = train(split, range(1_000))
    next(batches)
    assert loader_threads()
    # Work runs ahead of its use, but not far.
    assert len(split.requested) <= (BATCHES_AHEAD + 1) * 6
    next(batches)
    batches.close()
    assert not loader_threads()
    assert len(split.requested) <= (BATCHES_AHEAD + 2) * 6


def test_batches_are_made_while_the_consumer_computes():
    split = NumberedSplit()
    batches = train(split, range(100))
    next(batches)
    ahead = sorted(expected_indices(range(BATCHES_AHEAD + 1)).ravel().tolist())
    for _ in range(1_000):
        if len(split.requested) == len(ahead):
            break
        threading.Event().wait(0.01)
    assert sorted(split.requested) == ahead
    batches.close()


@pytest.mark.parametrize("threads", [1, 4])
def test_an_exception_in_a_thread_reaches_the_consumer(threads):
    fatal = int(expected_indices(range(3))[2, 4])
    batches = train(NumberedSplit(fatal=fatal), threads=threads)
    next(batches)
    next(batches)
    with pytest.raises(DataError, match=f"^file of {fatal} is truncated"):
        next(batches)
    assert not loader_threads()
    with pytest.raises(DataError, match="file of 20 is truncated"):
        evaluate(NumberedSplit(fatal=20), threads=threads)
    assert not loader_threads()


def test_a_batch_larger_than_the_set_is_an_error():
    with pytest.raises(ValueError, match="batch_size is 31"):
        next(train(NumberedSplit(), batch_size=31))
    assert not loader_threads()
