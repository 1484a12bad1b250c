import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from experiments.data.batches import batch_indices
from experiments.data.core_processes import all_cores
from experiments.data.errors import DataError
from experiments.data.file_feed import (
    BATCHES_AHEAD,
    MAX_SUCCESSORS,
    UndecodableImages,
    evaluation_batches,
    image_randomness,
    training_batches,
)
from tests.experiments.data.numbered_split import NumberedSplit
from tests.experiments.helpers import REPOSITORY, command_environment


def train(split, steps=range(8), **options):
    defaults = {
        "seed": 3,
        "batch_size": 6,
        "shuffle": "examples",
        "workers": 0,
        "undecodable": UndecodableImages(100),
    }
    return training_batches(split, steps, **(defaults | options))


def evaluate(split, num_examples=30, **options):
    defaults = {
        "batch_size": 8,
        "crops": 2,
        "workers": 0,
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
            np.random.Generator(
                np.random.Philox(key=[3, 0], counter=[0, 0, position, step])
            ).integers(0, 256)
            for position in range(6)
        ]
        np.testing.assert_array_equal(batch.images[:, 1], draws)


@pytest.mark.parametrize("first", [0, 1, 5, 7])
def test_a_batch_depends_on_seed_and_step_alone(first):
    whole = list(train(NumberedSplit()))
    rest = list(train(NumberedSplit(), range(first, 8)))
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


def test_none_may_be_broken_where_the_limit_is_none():
    with pytest.raises(DataError, match=r"more than 0 images .* image 8 is broken"):
        list(train(NumberedSplit({8}), range(5), undecodable=UndecodableImages(0)))


def test_a_message_counts_once():
    undecodable = UndecodableImages(1)
    for _ in range(3):
        undecodable.add("this")
    assert list(undecodable.messages) == ["this"]
    with pytest.raises(DataError, match="the last is: that;"):
        undecodable.add("that")


def test_a_set_without_a_single_image_is_given_up():
    with pytest.raises(
        DataError, match=rf"^{MAX_SUCCESSORS} consecutive images, from number "
    ):
        list(train(NumberedSplit(range(30)), range(1)))


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


def test_stopping_early_leaves_no_thread_and_little_work():
    before = set(threading.enumerate())
    split = NumberedSplit()
    batches = train(split, range(1_000))
    next(batches)
    next(batches)
    batches.close()
    # Work runs ahead of its use, but not far.
    assert len(split.requested) <= (BATCHES_AHEAD + 4) * 6
    deadline = time.monotonic() + 10
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before


def test_batches_are_made_while_the_consumer_computes():
    split = NumberedSplit()
    batches = train(split, range(100))
    next(batches)
    deadline = time.monotonic() + 10
    while len(split.requested) < (BATCHES_AHEAD + 1) * 6:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    batches.close()


def test_an_error_reaches_the_consumer():
    fatal = int(expected_indices(range(3))[2, 4])
    batches = train(NumberedSplit(fatal=fatal))
    next(batches)
    next(batches)
    with pytest.raises(DataError, match=f"^file of {fatal} is truncated"):
        next(batches)
    with pytest.raises(DataError, match="file of 20 is truncated"):
        evaluate(NumberedSplit(fatal=20))


def test_each_place_of_each_step_has_random_numbers_of_its_own():
    draws = [
        image_randomness(seed, step)(position).random()
        for seed in range(3)
        for step in range(50)
        for position in range(50)
    ]
    assert len(set(draws)) == len(draws)
    assert abs(np.mean(draws) - 0.5) < 0.01
    neighbours = np.corrcoef(draws[:-1], draws[1:])[0, 1]
    assert abs(neighbours) < 0.05


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(workers, tmp_path):
    """Whole, from the middle, in parts, with undecodable images, and to evaluate."""
    broken = {4, 12, 13}
    alone = list(train(NumberedSplit(broken)))
    counted = UndecodableImages(100)
    split = NumberedSplit(broken, log=tmp_path)
    assert_same(list(train(split, workers=workers, undecodable=counted)), alone)
    assert sorted(counted.messages) == [f"image {i} is broken" for i in (12, 13, 4)]
    # Each made batches, and this process none.
    readers = {int(path.name) for path in tmp_path.iterdir()}
    assert len(readers) == workers
    assert os.getpid() not in readers
    rest = list(train(split, range(3, 8), workers=workers, part=(1, 2)))
    assert_same(rest, list(train(NumberedSplit(broken), range(3, 8), part=(1, 2))))
    assert_same(evaluate(split, 19, workers=workers), evaluate(split, 19))
    assert not multiprocessing.active_children()


def test_workers_end_when_the_consumer_stops_or_a_file_is_damaged(tmp_path):
    batches = train(NumberedSplit(log=tmp_path), range(1_000), workers=2)
    next(batches)
    assert multiprocessing.active_children()
    batches.close()
    assert not multiprocessing.active_children()
    fatal = int(expected_indices(range(3))[2, 4])
    batches = train(NumberedSplit(fatal=fatal), workers=2)
    with pytest.raises(DataError, match=f"^file of {fatal} is truncated"):
        list(batches)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("what", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_workers_alone_changes_nothing(what, tmp_path):
    batches = train(NumberedSplit(log=tmp_path), range(40), workers=2)
    first = [next(batches), next(batches)]
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, what)
    assert_same([*first, *batches], list(train(NumberedSplit(), range(40))))


CONSUMER = """
import sys, time
from pathlib import Path
from experiments.data.file_feed import UndecodableImages, training_batches
from tests.experiments.data.numbered_split import NumberedSplit

batches = training_batches(
    NumberedSplit(log=Path(sys.argv[1])), range(10**6), seed=0, batch_size=6,
    shuffle="examples", workers=2, undecodable=UndecodableImages(0),
)
next(batches), next(batches)
print("ready", flush=True)
for _ in batches:
    time.sleep(0.01)
"""


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_end_with_their_parent(ending, tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", CONSUMER, str(tmp_path)],
        cwd=REPOSITORY,
        env=command_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout.readline() == "ready\n"
        workers = [int(path.name) for path in tmp_path.iterdir()]
        assert len(workers) == 2
        process.send_signal(ending)
        assert process.wait(60) != 0
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_all_cores_are_those_that_may_be_used():
    assert all_cores() == len(os.sched_getaffinity(0))


def test_splits_of_files_can_be_pickled(tiny_dir):
    from experiments.data.prepared_splits import load_prepared_splits
    from experiments.data.splits import Augmentation

    train_split, _ = load_prepared_splits(
        "tiny", str(tiny_dir), Augmentation(5, 1.0, False, 1.0)
    )
    first = train_split.training_example(3, np.random.default_rng(0))
    copy = pickle.loads(pickle.dumps(train_split))
    again = copy.training_example(3, np.random.default_rng(0))
    np.testing.assert_array_equal(first.images, again.images)
    assert copy.shard_lengths == train_split.shard_lengths


def test_a_batch_larger_than_the_set_is_an_error():
    with pytest.raises(ValueError, match="batch_size is 31"):
        next(train(NumberedSplit(), batch_size=31))
