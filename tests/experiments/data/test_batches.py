import jax
import numpy as np
import pytest

from experiments.data.batches import _epoch_order, batch_indices


def test_shape_and_type():
    indices = batch_indices([3, 5], 0, 4, num_examples=10, batch_size=2)
    assert isinstance(indices, np.ndarray)
    assert indices.shape == (4, 2, 2)
    assert indices.dtype == np.int32


@pytest.mark.parametrize("batch_size", [1, 5, 7, 20])
def test_each_epoch_is_a_fresh_permutation_without_its_rest(batch_size):
    steps = 20 // batch_size
    orders = set()
    for epoch in range(4):
        indices = np.asarray(batch_indices([0], epoch * steps, steps, 20, batch_size))
        order = indices.ravel()
        assert len(set(order.tolist())) == steps * batch_size
        assert order.min() >= 0
        assert order.max() < 20
        orders.add(tuple(order.tolist()))
    assert len(orders) == 4


def test_order_is_the_documented_one():
    for epoch in range(3):
        key = jax.random.fold_in(jax.random.key(17), epoch)
        expected = jax.random.permutation(key, 11)[:9].reshape(3, 3)
        found = batch_indices([17], 3 * epoch, 3, num_examples=11, batch_size=3)
        np.testing.assert_array_equal(found[:, 0], expected)


def test_examples_dropped_from_an_epoch_come_in_others():
    indices = batch_indices([0], 0, 2 * 12, num_examples=10, batch_size=4)
    assert set(np.asarray(indices).ravel().tolist()) == set(range(10))


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 50])
def test_chunks_of_any_size_give_the_same_order(chunk):
    whole = batch_indices([1, 2], 0, 50, num_examples=13, batch_size=4)
    chunks = [
        batch_indices([1, 2], first, min(chunk, 50 - first), 13, 4)
        for first in range(0, 50, chunk)
    ]
    np.testing.assert_array_equal(np.concatenate(chunks), whole)


def test_a_seed_decides_its_order_alone():
    both = batch_indices([1, 2], 5, 9, num_examples=30, batch_size=4)
    np.testing.assert_array_equal(both[:, :1], batch_indices([1], 5, 9, 30, 4))
    np.testing.assert_array_equal(both[:, 1:], batch_indices([2], 5, 9, 30, 4))
    _epoch_order.cache_clear()
    np.testing.assert_array_equal(both, batch_indices([1, 2], 5, 9, 30, 4))
    assert (np.asarray(both[:, 0]) != np.asarray(both[:, 1])).any()


def test_each_permutation_is_computed_once():
    _epoch_order.cache_clear()
    for first in range(0, 60, 4):
        batch_indices([1, 2, 3], first, 4, num_examples=12, batch_size=2)
    assert _epoch_order.cache_info().misses == 10


def test_no_steps():
    assert batch_indices([1], 3, 0, num_examples=5, batch_size=2).shape == (0, 1, 2)


@pytest.mark.parametrize("batch_size", [11, 0])
def test_impossible_batch_size(batch_size):
    with pytest.raises(
        ValueError, match=f"is {batch_size}: expected 1 to 10"
    ) as caught:
        batch_indices([0], 0, 1, num_examples=10, batch_size=batch_size)
    assert "\n" not in str(caught.value)


SHARDS = (4, 3, 5, 4)


def epoch_of(epoch, shard_lengths, num_examples=16, batch_size=1) -> list[int]:
    steps = num_examples // batch_size
    indices = batch_indices(
        [5], epoch * steps, steps, num_examples, batch_size, shard_lengths
    )
    assert indices.dtype == np.int32
    return indices.ravel().tolist()


def test_epochs_read_shards_whole_and_in_order():
    contents = [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9, 10, 11], [12, 13, 14, 15]]
    orders = set()
    for epoch in range(10):
        order = epoch_of(epoch, SHARDS)
        shards = []
        while order:
            (shard,) = (
                i for i, content in enumerate(contents) if content[0] == order[0]
            )
            length = len(contents[shard])
            assert order[:length] == contents[shard]
            order = order[length:]
            shards.append(shard)
        assert sorted(shards) == [0, 1, 2, 3]
        orders.add(tuple(shards))
    assert len(orders) > 5


def test_order_of_shards_is_the_documented_one():
    key = jax.random.fold_in(jax.random.key(5), 2)
    starts = [0, 4, 7, 12]
    expected = [starts[shard] for shard in jax.random.permutation(key, 4)]
    found = [index for index in epoch_of(2, SHARDS) if index in starts]
    assert found == expected


@pytest.mark.parametrize("shard_lengths", [None, (8,) * 8])
def test_the_same_examples_meet_if_shards_are_shuffled(shard_lengths):
    def companies(epoch):
        order = np.reshape(epoch_of(epoch, shard_lengths, 64, 4), (16, 4))
        return {frozenset(batch.tolist()) for batch in order}

    first = companies(0)
    for epoch in range(1, 6):
        common = first & companies(epoch)
        assert len(common) == (0 if shard_lengths is None else 16)


def test_chunks_and_seeds_with_shards():
    both = batch_indices([1, 2], 0, 20, 16, 3, SHARDS)
    parts = [
        batch_indices([1, 2], first, 5, 16, 3, list(SHARDS))
        for first in range(0, 20, 5)
    ]
    np.testing.assert_array_equal(np.concatenate(parts), both)
    np.testing.assert_array_equal(both[:, 1:], batch_indices([2], 0, 20, 16, 3, SHARDS))
    assert (both[:, 0] != both[:, 1]).any()
