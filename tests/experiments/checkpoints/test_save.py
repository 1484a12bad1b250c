import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import bn_jax
from experiments.checkpoints import save as saving
from experiments.checkpoints import stored
from experiments.checkpoints.save import Checkpoints, restore_newest
from experiments.checkpoints.stored import (
    ARRAY_ITEMS,
    CheckpointError,
    read_metadata,
    stored_steps,
)
from tests.experiments.helpers import (
    ORBAX_LEFTOVERS,
    REPOSITORY,
    assert_trees_identical,
    command_environment,
    make_models,
    make_states,
    read_files,
)

MODELS = make_models(hidden=(3, 2))
CONFIG = {"hidden": (3, 2), "dataset": "mnist"}

pytestmark = [
    pytest.mark.filterwarnings(ORBAX_LEFTOVERS),
    pytest.mark.usefixtures("collect_dropped_coroutines"),
]


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
    checkpoints = Checkpoints(directory, CONFIG)
    checkpoints.save(10, states)
    checkpoints.save(20, later)
    checkpoints.close()
    return directory


@pytest.fixture
def directory(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def save_all(directory: Path, states, scores: dict[int, float | None]) -> None:
    checkpoints = Checkpoints(directory)
    for step, score in scores.items():
        checkpoints.save(step, states, score)
    checkpoints.close()


def error_of(directory, like) -> str:
    before = read_files(directory)
    with pytest.raises(CheckpointError) as caught:
        Checkpoints(directory).restore_newest(like)
    assert read_files(directory) == before
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1_500
    return message


def test_empty_folder(tmp_path, states):
    assert Checkpoints(tmp_path / "none").restore_newest(states) is None
    assert not (tmp_path / "none").exists()


def test_newest_comes_back_bit_for_bit_and_in_place(saved, states, later):
    before = read_files(saved)
    step, found, _ = restore_newest(saved, states)
    assert step == 20
    assert_trees_identical(found, later)
    for leaf in jax.tree.leaves(found):
        assert leaf.sharding.is_fully_replicated
        assert leaf.devices() == set(jax.local_devices())
    dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(found)}
    assert dtypes == {"float32", "int32"}
    assert read_files(saved) == before


def test_restored_on_other_devices(saved, states, later):
    """On one, on two, divided over four, and as plain arrays."""
    devices = jax.devices()
    over_two = Mesh(np.array(devices[2:4]), ("a",))
    placements = [
        jax.sharding.SingleDeviceSharding(devices[5]),
        NamedSharding(over_two, PartitionSpec()),
        NamedSharding(over_two, PartitionSpec("a")),
    ]
    for placement in placements:
        like = jax.device_put(states, placement)
        _, found, _ = restore_newest(saved, like)
        assert_trees_identical(found, later)
        for leaf in jax.tree.leaves(found):
            assert leaf.sharding == placement
    _, found, _ = restore_newest(saved, jax.device_get(states))
    assert_trees_identical(found, later)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(found))


def test_what_is_restored_may_be_donated(saved, states, later):
    _, found, _ = restore_newest(saved, states)
    double = jax.jit(lambda tree: jax.tree.map(lambda x: 2 * x, tree), donate_argnums=0)
    expected = jax.tree.map(lambda leaf: 2 * np.asarray(leaf), later)
    assert_trees_identical(double(found), expected)


def test_values_that_compare_badly(tmp_path, states):
    def poison(leaf):
        values = np.array(leaf)
        if values.dtype == np.float32:
            values.flat[:1] = [np.nan]
            values.flat[-1:] = [-0.0]
        return jax.device_put(values, leaf.sharding)

    poisoned = jax.tree.map(poison, states)
    save_all(tmp_path, poisoned, {3: None})
    _, found, _ = restore_newest(tmp_path, states)
    assert_trees_identical(found, poisoned)


def test_other_dtypes(tmp_path, states):
    odd = {
        name: state._replace(
            params={
                "half": jax.numpy.arange(4, dtype=jax.numpy.bfloat16),
                "truth": np.array([True, False]),
            }
        )
        for name, state in states.items()
    }
    save_all(tmp_path, odd, {3: None})
    _, found, _ = restore_newest(tmp_path, odd)
    assert_trees_identical(found, odd)


def test_what_a_checkpoint_says_about_itself(saved, states):
    metadata = read_metadata(saved / "20")
    assert metadata.step == 20
    assert metadata.score is None
    assert metadata.config == json.loads(json.dumps(CONFIG))
    assert metadata.networks == ["baseline", "batch_norm"]
    assert (
        metadata.provenance.items()
        >= {
            "bn_jax": bn_jax.__version__,
            "jax": jax.__version__,
            "devices": jax.device_count(),
            "processes": 1,
        }.items()
    )
    record = metadata.arrays["params/baseline/Dense_0/kernel"]
    assert record.shape == (2, 4, 3)
    assert record.dtype == "float32"
    assert record.nbytes == 96
    assert len(metadata.arrays) == len(jax.tree.leaves(states))
    assert {name.split("/")[0] for name in metadata.arrays} == set(ARRAY_ITEMS)


def test_two_newest_are_kept(tmp_path, states):
    save_all(tmp_path, states, dict.fromkeys((5, 10, 15, 20)))
    assert {path.name for path in tmp_path.iterdir()} == {"15", "20"}


def test_the_best_is_kept_too(tmp_path, states):
    """Over restarts, and of equals the first; what has no score is never the best."""
    save_all(tmp_path, states, {1: 50.0, 2: 70.0, 3: 70.0})
    save_all(tmp_path, states, {4: None, 5: float("nan")})
    assert stored_steps(tmp_path) == [2, 4, 5]
    save_all(tmp_path, states, {6: np.float32(60.0), 7: 69.0})
    assert stored_steps(tmp_path) == [2, 6, 7]
    assert [read_metadata(tmp_path / str(step)).score for step in (2, 6, 7)] == [
        *(70.0, 60.0, 69.0)
    ]
    save_all(tmp_path, states, {8: 71.0, 9: 0.0, 10: 0.0})
    assert stored_steps(tmp_path) == [8, 9, 10]


def test_arrays_may_be_overwritten_once_save_returns(tmp_path, states):
    doomed = jax.tree.map(lambda leaf: leaf + 0, states)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, doomed)
    jax.tree.map(lambda leaf: leaf.delete(), doomed)
    checkpoints.close()
    assert_trees_identical(restore_newest(tmp_path, states)[1], states)


@pytest.mark.parametrize("step", [20, 15])
def test_existing_or_older_step_is_not_saved(directory, states, step):
    checkpoints = Checkpoints(directory)
    before = read_files(directory)
    with pytest.raises(CheckpointError, match=f"was written for step {step}: .*copy"):
        checkpoints.save(step, states)
    checkpoints.close()
    assert read_files(directory) == before


def test_unfinished_checkpoints_of_killed_runs_are_cleared_away(directory, states):
    for step in 20, 30:
        shutil.copytree(
            directory / "10", directory / f"{step}.orbax-checkpoint-tmp" / "params"
        )
    assert restore_newest(directory, states)[0] == 20
    save_all(directory, states, {30: None})
    assert {path.name for path in directory.iterdir()} == {"20", "30"}
    step, found, _ = restore_newest(directory, states)
    assert step == 30
    assert_trees_identical(found, states)


# Damage: the one before is taken, and nothing is lost.


def test_damage_is_reported_and_set_aside(directory, states, later, capsys):
    shutil.rmtree(directory / "20" / "params")
    before = read_files(directory / "20")
    checkpoints = Checkpoints(directory)
    step, found, _ = checkpoints.restore_newest(states)
    assert step == 10
    assert_trees_identical(found, states)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"Checkpoint {directory / '20'} is damaged (params cannot ")
    assert line.endswith("is now 20.damaged, and left out.")
    assert read_files(directory / "20.damaged") == before
    checkpoints.save(20, later)
    checkpoints.close()
    assert_trees_identical(restore_newest(directory, states)[:2], (20, later))
    # Again, in the same step.
    shutil.rmtree(directory / "20" / "params")
    assert Checkpoints(directory).restore_newest(states)[0] == 10
    assert {path.name for path in directory.iterdir()} == {
        *("10", "20.damaged", "20.damaged-2")
    }


def test_reading_alone_sets_nothing_aside(directory, states, capsys):
    shutil.rmtree(directory / "20" / "params")
    before = read_files(directory)
    assert restore_newest(directory, states)[0] == 10
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith(") and left out.")
    assert read_files(directory) == before


def test_without_a_sound_checkpoint_nothing_is_set_aside(directory, states):
    shutil.rmtree(directory / "20" / "params")
    path = directory / "10" / "metadata" / "metadata"
    path.write_text(path.read_text().replace("mnist", "mnisd"))
    message = error_of(directory, states)
    assert f"no checkpoint in {directory} is sound: 20 (params cannot be" in message
    assert (
        "; 10 (metadata cannot be read: it differs from its checksum); restore one, or"
        in message
    )


def test_a_step_under_another_name_is_damage(directory, states, capsys):
    shutil.copytree(directory / "10", directory / "30")
    assert Checkpoints(directory).restore_newest(states)[0] == 20
    assert "30 is damaged (it is the checkpoint of step 10)" in capsys.readouterr().out


def test_a_damaged_checkpoint_that_cannot_be_renamed(directory, states, monkeypatch):
    shutil.rmtree(directory / "20" / "params")

    def fail(*_):
        raise OSError(30, "Read-only file system", "20")

    monkeypatch.setattr(Path, "rename", fail)
    message = error_of(directory, states)
    assert f"checkpoint {directory / '20'} is damaged (params cannot be" in message
    assert "and cannot be renamed (Read-only file system); move it away." in message


def data_files(directory) -> list[str]:
    """The files of the newest checkpoint that hold arrays, and the metadata."""
    names = read_files(directory / "20")
    data = [name for name in names if "/d/" in name]
    assert {name.split("/")[0] for name in data} == set(ARRAY_ITEMS)
    return [*data, "metadata/metadata"]


def is_noticed(directory, states, later) -> bool:
    """Whether the newest is passed over; if not, its arrays must be right."""
    step, found, _ = restore_newest(directory, states)
    assert_trees_identical(found, {10: states, 20: later}[step])
    return step == 10


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
            noticed += is_noticed(directory, states, later)
        path.write_bytes(content)
    assert noticed > 10
    assert not is_noticed(directory, states, later)


def test_every_bit_of_the_metadata_counts(directory):
    path = directory / "20" / "metadata" / "metadata"
    whole, content = read_metadata(directory / "20"), path.read_bytes()
    for position in np.random.default_rng(0).integers(0, len(content), 300):
        damaged = bytearray(content)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        with contextlib.suppress(stored.DamagedError):
            assert read_metadata(directory / "20") == whole  # a space, say


def test_every_flipped_array_value_is_noticed(directory, states, monkeypatch):
    """As if the damage had passed every reader below."""
    metadata = read_metadata(directory / "20")
    whole = stored._read_item

    for damaged_name in metadata.arrays:

        def flip(path, damaged_name=damaged_name):
            tree = whole(path)
            leaves, structure = jax.tree.flatten({path.name: tree})
            names = stored.named_leaves({path.name: tree})
            for position, name in enumerate(names):
                if name == damaged_name:
                    content = bytearray(leaves[position].tobytes())
                    content[-1] ^= 1
                    leaves[position] = np.frombuffer(
                        content, leaves[position].dtype
                    ).reshape(leaves[position].shape)
            return structure.unflatten(leaves)[path.name]

        monkeypatch.setattr(stored, "_read_item", flip)
        with pytest.raises(
            stored.DamagedError,
            match=f"^1 of {len(metadata.arrays)} arrays differ .* {damaged_name}$",
        ):
            stored.read_arrays(directory / "20", metadata)


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
        noticed += is_noticed(directory, states, later)
        path.write_bytes(content)
    assert noticed >= len(ARRAY_ITEMS) + 1


@pytest.mark.parametrize("damage", ["truncated", "deleted"])
def test_files_that_are_not_read_do_not_matter(directory, states, later, damage):
    """Nor do they keep the run from saving."""
    for name in "_CHECKPOINT_METADATA", "commit_success.txt", "metadata":
        path = directory / "20" / name
        path = path / "commit_success.txt" if path.is_dir() else path
        content = path.read_bytes()
        path.unlink()
        if damage == "truncated":
            path.write_bytes(content[:10])
    assert not is_noticed(directory, states, later)
    save_all(directory, states, {30: None})
    assert stored_steps(directory) == [20, 30]


# What the system cannot read now is not damage.

UNREADABLE = {
    # Reading a process' own memory at its start is an input/output error.
    "EIO": ("/proc/self/mem", "Input/output error"),
    "ELOOP": (None, "Too many levels of symbolic links"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_cannot_be_read_now_is_not_damage(directory, states, later, kind):
    """Whatever file it is: one line, nothing is renamed, and then it goes on."""
    target, reason = UNREADABLE[kind]
    refused = []
    for name in data_files(directory):
        path = directory / "20" / name
        content = path.read_bytes()
        path.unlink()
        path.symlink_to(target or path.name)
        try:
            assert not is_noticed(directory, states, later)  # it was not needed
        except CheckpointError as error:
            refused.append(str(error))
        path.unlink()
        path.write_bytes(content)
    assert len(refused) >= len(ARRAY_ITEMS) + 1
    for message in refused:
        assert f"cannot be read ({reason}); nothing was changed" in message
    assert stored_steps(directory) == [10, 20]
    assert not is_noticed(directory, states, later)


TOO_MANY_FILES = """
import os, resource, sys
from pathlib import Path
from experiments.checkpoints.load import load_variables
from experiments.checkpoints.stored import CheckpointError, DamagedError
open_files = len(os.listdir("/proc/self/fd"))
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
for more in range(int(sys.argv[2])):
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_files - 1 + more, hard))
    try:
        load_variables(sys.argv[1], network="baseline")
    except (CheckpointError, OSError) as error:
        assert "Too many open files" in str(error), error
        print("refused")
"""


def test_too_many_open_files_are_not_damage(directory):
    done = subprocess.run(
        [sys.executable, "-c", TOO_MANY_FILES, str(directory), "4"],
        cwd=REPOSITORY,
        env=command_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "refused" in done.stdout


# Another network is not damage.


def with_params(states, change):
    """States whose first network has other parameters."""
    state = states["baseline"]
    params = {name: dict(layer) for name, layer in state.params.items()}
    change(params)
    return states | {"baseline": state._replace(params=params)}


def test_another_network_is_refused_leaf_by_leaf(directory, states):
    def change(params):
        bias = params["Dense_0"].pop("bias")
        params["Dense_0"]["beta"] = bias
        params["Dense_1"]["bias"] = bias
        params["Dense_2"]["bias"] = params["Dense_2"]["bias"].astype(np.float16)

    message = error_of(directory, with_params(states, change))
    assert message == (
        f"checkpoint {directory / '20'} is of another network: "
        "missing: params/baseline/Dense_0/beta; "
        "extra: params/baseline/Dense_0/bias; "
        "shape of params/baseline/Dense_1/bias: (2, 2) there, (2, 3) here; "
        "dtype of params/baseline/Dense_2/bias: float32 there, float16 here. "
        "Give the configuration that it was trained with, or another workdir."
    )


def test_of_many_differences_the_first_are_listed(directory, states):
    fewer = jax.tree.map(lambda leaf: leaf[:1], states)
    message = error_of(directory, fewer)
    assert message.count("there, (1") == 8
    assert f"; and {len(jax.tree.leaves(states)) - 8} more. Give the" in message


def test_a_damaged_newest_does_not_hide_another_network(directory, states):
    (directory / "20" / "metadata" / "metadata").write_text("{")
    others = with_params(states, lambda params: params.pop("Dense_2"))
    assert f"{directory / '10'} is of another network" in error_of(directory, others)


def test_another_format_is_refused(directory, states):
    path = directory / "20" / "metadata" / "metadata"
    path.write_text('{"step": 20, "checksums": {}}')
    assert "20 has checkpoint format 0: this version reads" in error_of(
        directory, states
    )


# Writing.


def test_failure_to_write_is_one_line(tmp_path, states, monkeypatch):
    manager = saving.ocp.CheckpointManager
    path = "a/long/path/" * 50
    full = ValueError(f"EXHAUSTED: writing {path}:\n No space left on device")

    def failing(method):
        def call(*args, **kwargs):
            method(*args, **kwargs)
            raise full

        return call

    for method in "save", "close":
        checkpoints = Checkpoints(tmp_path / method)
        with monkeypatch.context() as patch:
            patch.setattr(manager, method, failing(getattr(manager, method)))
            with (
                pytest.raises(
                    CheckpointError, match=r"EXHAUSTED: .* \.\.\. .* No space .*remedy"
                ) as caught,
                contextlib.closing(checkpoints),
            ):
                checkpoints.save(1, states)
        assert len(str(caught.value)) < 500
        assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(tmp_path, states):
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match="Permission denied"):
        save_all(tmp_path / "new", states, {1: None})
