"""Checkpoints that earlier versions wrote can still be read: see make_stored.py."""

import jax
import numpy as np
import pytest

from experiments.checkpoints.load import load_variables
from experiments.checkpoints.save import restore_newest
from experiments.checkpoints.stored import (
    ARRAY_ITEMS,
    FORMATS,
    named_leaves,
    read_metadata,
)
from tests.experiments.checkpoints import make_stored
from tests.experiments.checkpoints.make_stored import (
    CONFIG,
    NETWORK,
    SCORE,
    STEP,
    STORED,
)
from tests.experiments.helpers import assert_trees_identical

FOLDERS = sorted(STORED.glob("format_*"))


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def folder(request):
    return request.param


def read_arrays(folder):
    with np.load(folder / "arrays.npz") as file:
        return dict(file)


def test_there_is_one_of_the_format_of_today():
    assert f"format_{FORMATS[-1]}" in [folder.name for folder in FOLDERS]


def test_the_state_is_restored(folder):
    like = {NETWORK: make_stored.initial_state()}
    step, states, _ = restore_newest(folder / "checkpoints", like)
    assert step == STEP
    found = named_leaves(jax.device_get(states[NETWORK]._asdict()))
    assert {name.split("/")[0] for name in found} == set(ARRAY_ITEMS)
    assert_trees_identical(found, read_arrays(folder))
    initial = named_leaves(jax.device_get(like[NETWORK]._asdict()))
    for name, array in found.items():
        if not name.endswith("learning_rate"):
            assert not np.array_equal(array, initial[name]), name


def test_the_metadata_is_read(folder):
    metadata = read_metadata(folder / "checkpoints" / str(STEP))
    assert (metadata.step, metadata.score) == (STEP, SCORE)
    assert metadata.config == CONFIG
    assert metadata.networks == [NETWORK]
    assert metadata.provenance["devices"] == 1


def test_the_network_computes(folder):
    variables = load_variables(folder / "checkpoints", step="best")
    inputs = np.linspace(-1, 1, 20, dtype=np.float32).reshape(5, 4)
    logits = make_stored.MODEL.apply(variables, inputs, train=False)
    # By hand, in float64.
    arrays = {
        name: array.astype(np.float64) for name, array in read_arrays(folder).items()
    }
    hidden = inputs @ arrays["params/Dense_0/kernel"]
    mean, var = (arrays[f"batch_stats/BatchNorm_0/{name}"] for name in ("mean", "var"))
    hidden = (hidden - mean) / np.sqrt(var + 1e-3)
    hidden *= arrays["params/BatchNorm_0/scale"]
    hidden += arrays["params/BatchNorm_0/bias"]
    hidden = 1 / (1 + np.exp(-hidden))
    expected = hidden @ arrays["params/Dense_1/kernel"] + arrays["params/Dense_1/bias"]
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)
