import jax
import numpy as np
import pytest

from experiments.data import device_feed
from experiments.data.device_feed import DeviceFeed, fits_on_device
from experiments.data.file_feed import UndecodableImages, training_batches
from tests.experiments.data.numbered_split import NumberedSplit


def make_feed(shards=None, steps_per_piece=4, seeds=(3,)) -> DeviceFeed:
    return DeviceFeed(seeds, 30, 8, shards, steps_per_piece)


def joined(indices) -> np.ndarray:
    """(devices, steps, seeds, examples / devices) -> (steps, seeds, examples)."""
    return np.concatenate(list(indices), axis=2)


@pytest.mark.parametrize("shuffle", ["examples", "shards"])
@pytest.mark.parametrize("first", [0, 5])
def test_both_feeds_have_the_same_order_of_examples(shuffle, first):
    shards = NumberedSplit.shard_lengths if shuffle == "shards" else None
    batches = training_batches(
        NumberedSplit(),
        range(first, 12),
        seed=3,
        batch_size=8,
        shuffle=shuffle,
        workers=0,
        undecodable=UndecodableImages(0),
    )
    from_files = np.stack([batch.images[:, 0] for batch in batches])
    pieces = [joined(piece) for _, piece in make_feed(shards)(first, [12])]
    np.testing.assert_array_equal(np.concatenate(pieces)[:, 0], from_files)


def test_no_piece_goes_beyond_a_stop_or_is_too_long():
    found = [count for count, _ in make_feed()(2, [3, 9, 10])]
    assert found == [1, 4, 2, 1]
    for count, piece in make_feed(seeds=(3, 4))(2, [9]):
        assert piece.shape == (jax.device_count(), count, 2, 1)
        assert piece.dtype == np.int32


def test_pieces_do_not_depend_on_where_they_are_cut():
    whole = make_feed(steps_per_piece=100).indices(0, 10)
    parts = [piece for _, piece in make_feed(steps_per_piece=3)(0, [4, 10])]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


def test_what_fits_on_a_device(monkeypatch):
    assert fits_on_device(device_feed.BYTES_WITHOUT_LIMIT)
    assert not fits_on_device(device_feed.BYTES_WITHOUT_LIMIT + 1)

    class Device:
        def memory_stats(self):
            return {"bytes_limit": 4_000}

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    assert fits_on_device(1_000)
    assert not fits_on_device(1_001)
