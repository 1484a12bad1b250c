import gc
import shutil
from collections.abc import Iterator

import jax
import numpy as np
import pytest

from experiments.checkpoints import ARRAY_ITEMS, CheckpointError, Checkpoints
from tests.experiments.helpers import (
    ORBAX_LEFTOVERS,
    assert_trees_identical,
    make_models,
    make_states,
    read_files,
)

MODELS = make_models(hidden=(3, 2))

pytestmark = pytest.mark.filterwarnings(ORBAX_LEFTOVERS)


@pytest.fixture(autouse=True)
def collect_dropped_coroutines() -> Iterator[None]:
    yield
    gc.collect()


@pytest.fixture(scope="module")
def states():
    return make_states(MODELS, num_inputs=4)


@pytest.fixture(scope="module")
def later(states):
    return jax.tree.map(lambda leaf: leaf + 1, states)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, states, later):
    """Checkpoints of steps 10 and 20, to be copied before they are damaged."""
    directory = tmp_path_factory.mktemp("checkpoints")
    checkpoints = Checkpoints(directory)
    checkpoints.save(10, states)
    checkpoints.save(20, later)
    checkpoints.close()
    return directory


@pytest.fixture
def directory(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def restore(directory, like):
    checkpoints = Checkpoints(directory)
    try:
        return checkpoints.restore_newest(like)
    finally:
        checkpoints.close()


def error_of(directory, like) -> str:
    with pytest.raises(CheckpointError) as caught:
        restore(directory, like)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1_000
    return message


def test_empty_folder(tmp_path, states):
    assert restore(tmp_path / "none", states) is None


def test_newest_comes_back_bit_for_bit_and_in_place(saved, states, later):
    step, found = restore(saved, states)
    assert step == 20
    assert_trees_identical(found, later)
    for leaf in jax.tree.leaves(found):
        assert leaf.sharding.is_fully_replicated
        assert leaf.devices() == set(jax.local_devices())
    dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(found)}
    assert dtypes == {"float32", "int32"}


def test_values_that_compare_badly(tmp_path, states):
    def poison(leaf):
        values = np.array(leaf)
        if values.dtype == np.float32:
            values.flat[:1] = [np.nan]
            values.flat[-1:] = [-0.0]
        return jax.device_put(values, leaf.sharding)

    poisoned = jax.tree.map(poison, states)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, poisoned)
    checkpoints.close()
    _, found = restore(tmp_path, states)
    assert_trees_identical(found, poisoned)


def test_two_newest_are_kept(tmp_path, states):
    checkpoints = Checkpoints(tmp_path)
    for step in 5, 10, 15, 20:
        checkpoints.save(step, states)
    checkpoints.close()
    assert {path.name for path in tmp_path.iterdir()} == {"15", "20"}


def test_arrays_may_be_overwritten_once_save_returns(tmp_path, states):
    doomed = jax.tree.map(lambda leaf: leaf + 0, states)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, doomed)
    jax.tree.map(lambda leaf: leaf.delete(), doomed)
    checkpoints.close()
    assert_trees_identical(restore(tmp_path, states)[1], states)


@pytest.mark.parametrize("step", [20, 15])
def test_existing_or_older_step_is_not_saved(directory, states, step):
    checkpoints = Checkpoints(directory)
    before = read_files(directory)
    with pytest.raises(CheckpointError, match=f"was written for step {step}: .*copy"):
        checkpoints.save(step, states)
    checkpoints.close()
    assert read_files(directory) == before


def test_unfinished_checkpoint_of_a_killed_run_is_passed_over(directory, states):
    for step in 20, 30:
        shutil.copytree(
            directory / "10", directory / f"{step}.orbax-checkpoint-tmp" / "params"
        )
    assert restore(directory, states)[0] == 20
    checkpoints = Checkpoints(directory)
    checkpoints.save(30, states)
    checkpoints.close()
    step, found = restore(directory, states)
    assert step == 30
    assert_trees_identical(found, states)


def test_error_names_the_folder_and_the_step_before(directory, states):
    shutil.rmtree(directory / "20" / "params")
    message = error_of(directory, states)
    assert (
        f"checkpoint {directory / '20'} is damaged, or of another network (" in message
    )
    assert "move or delete that folder to go on from step 10." in message
    shutil.rmtree(directory / "20")
    assert restore(directory, states)[0] == 10
    shutil.rmtree(directory / "10" / "step")
    assert "to go on from the start." in error_of(directory, states)


def data_files(directory) -> list[str]:
    """The files of the newest checkpoint that hold arrays, and the checksums."""
    names = read_files(directory / "20")
    data = [name for name in names if "/d/" in name]
    assert {name.split("/")[0] for name in data} == set(ARRAY_ITEMS)
    return [*data, "metadata/metadata"]


def test_a_flipped_bit_is_noticed_or_harmless(directory, states, later):
    """Orbax loads most of them as wrong values without a word."""
    noticed = 0
    random = np.random.default_rng(0)
    for name in data_files(directory):
        path = directory / "20" / name
        content = path.read_bytes()
        for position in random.integers(0, len(content), 3):
            damaged = bytearray(content)
            damaged[position] ^= 1 << random.integers(8)
            path.write_bytes(damaged)
            before = read_files(directory)
            try:
                # Some bytes are not read: the arrays must be right nevertheless.
                assert_trees_identical(restore(directory, states)[1], later)
            except CheckpointError:
                noticed += 1
            assert read_files(directory) == before
        path.write_bytes(content)
    assert noticed > 10
    assert_trees_identical(restore(directory, states)[1], later)


def test_every_flipped_array_value_is_noticed(directory, states, monkeypatch):
    """As if the damage had passed every reader below."""
    checkpoints = Checkpoints(directory)
    whole = checkpoints._manager.restore
    leaves = len(jax.tree.leaves(states))

    for damaged_leaf in range(leaves):

        def flip(*args, damaged_leaf=damaged_leaf, **kwargs):
            restored = whole(*args, **kwargs)
            items = {name: restored[name] for name in ARRAY_ITEMS}
            arrays, structure = jax.tree.flatten(items)
            content = bytearray(np.asarray(arrays[damaged_leaf]).tobytes())
            content[-1] ^= 1
            shape = arrays[damaged_leaf].shape
            dtype = arrays[damaged_leaf].dtype
            arrays[damaged_leaf] = np.frombuffer(content, dtype).reshape(shape)
            return structure.unflatten(arrays) | {"metadata": restored["metadata"]}

        monkeypatch.setattr(checkpoints._manager, "restore", flip)
        with pytest.raises(CheckpointError, match=f"1 of {leaves} arrays differ"):
            checkpoints.restore_newest(states)
    monkeypatch.undo()
    checkpoints.close()


@pytest.mark.parametrize("damage", ["truncated", "emptied", "deleted"])
def test_truncated_and_deleted_files_are_noticed(directory, states, later, damage):
    noticed = 0
    for name in data_files(directory):
        path = directory / "20" / name
        content = path.read_bytes()
        if damage == "deleted":
            path.unlink()
        else:
            path.write_bytes(content[: len(content) // 2 * (damage == "truncated")])
        try:
            assert_trees_identical(restore(directory, states)[1], later)
        except CheckpointError:
            noticed += 1
        path.write_bytes(content)
    assert noticed >= len(ARRAY_ITEMS) + 1


@pytest.mark.parametrize("options", [{"hidden": (3, 3)}, {"hidden": (3, 2, 2)}])
def test_another_network_is_refused(directory, options):
    before = read_files(directory)
    others = make_states(make_models(**options), num_inputs=4)
    assert "20 is damaged, or of another network (" in error_of(directory, others)
    assert read_files(directory) == before


def test_another_number_of_replicas_is_refused(directory, states):
    fewer = jax.tree.map(lambda leaf: leaf[:1], states)
    assert "20 is damaged, or of another network (" in error_of(directory, fewer)


def test_failure_to_write_is_one_line(tmp_path, states, monkeypatch):
    checkpoints = Checkpoints(tmp_path)

    def fail(*args, **kwargs):
        raise ValueError("RESOURCE_EXHAUSTED:\n No space left on device")

    for method, call in {
        "save": lambda: checkpoints.save(1, states),
        "close": checkpoints.close,
    }.items():
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints._manager, method, fail)
            with pytest.raises(CheckpointError, match=r"EXHAUSTED: No space .*remedy"):
                call()
    checkpoints.close()
