"""The command line as a user meets it: the tests at the end start processes."""

import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments.checkpoints import export, inspect
from experiments.checkpoints.load import load_variables
from experiments.checkpoints.stored import CheckpointError, named_leaves
from experiments.configuration.fields import ConfigError
from experiments.running.workdir import WorkdirError
from tests.experiments.checkpoints.make_stored import STORED
from tests.experiments.helpers import (
    ORBAX_LEFTOVERS,
    REPOSITORY,
    command_environment,
    documentation_of,
    read_files,
)

CHECKPOINTS = STORED / "format_1" / "checkpoints"

pytestmark = pytest.mark.filterwarnings(ORBAX_LEFTOVERS)


@pytest.fixture
def copied(tmp_path):
    """A workdir with one sound checkpoint and one that another run damaged."""
    shutil.copytree(CHECKPOINTS, tmp_path / "run" / "checkpoints")
    return tmp_path / "run"


def damage(workdir):
    (workdir / "checkpoints" / "3" / "params" / "manifest.ocdbt").write_bytes(b"?")


def exported(folder, output, *, step="newest", network=None, fold=False):
    export.export(folder, step, str(output), network, fold)
    with np.load(output) as file:
        return dict(file)


def test_inspect_tells_everything(copied, capsys):
    shutil.copytree(CHECKPOINTS, copied / "population")
    inspect.inspect(copied, "newest")
    lines = capsys.readouterr().out.splitlines()
    for kind in "checkpoints", "population":
        assert f"{copied / kind}:" in lines
        assert f"{copied / kind / '3'}:" in lines
    for line in (
        "  step 3: 15 arrays, 196 bytes, score 62.5; newest; best",
        "  steps done, and so the position in the data: 3",
        '    note: "committed for later versions"',
        "    devices: 1",
        "  batch_stats: 2 arrays, 16 bytes",
        "    network/Dense_0/kernel: float32 (4, 2), 32 bytes",
        "    network/inner_state/0/trace/Dense_1/bias: float32 (3,), 12 bytes",
    ):
        assert lines.count(line) == 2, line


def test_inspect_of_one_checkpoint(copied, capsys):
    inspect.inspect(copied / "checkpoints" / "3", "newest")
    assert capsys.readouterr().out.startswith(f"{copied / 'checkpoints' / '3'}:\n")


def test_verify(copied, capsys):
    folder = copied / "checkpoints"
    inspect.verify(copied)
    assert capsys.readouterr().out == f"{folder / '3'}: sound, 15 arrays, 196 bytes\n"
    damage(copied)
    before = read_files(copied)
    with pytest.raises(CheckpointError, match=r"1 of 1 checkpoints damaged: .*params"):
        inspect.verify(copied)
    assert f"{folder / '3'}: damaged, params cannot be read" in capsys.readouterr().out
    assert read_files(copied) == before


def test_verify_reads_the_optimiser_too(copied):
    shutil.rmtree(copied / "checkpoints" / "3" / "opt_state")
    with pytest.raises(CheckpointError, match="opt_state cannot be read"):
        inspect.verify(copied)


def test_inspect_of_a_damaged_checkpoint(copied, capsys):
    (copied / "checkpoints" / "3" / "metadata" / "metadata").write_text("{")
    with pytest.raises(
        CheckpointError, match=r"3 is damaged \(metadata cannot be read"
    ):
        inspect.inspect(copied, "newest")
    assert "  step 3: metadata cannot be read" in capsys.readouterr().out


def test_export_to_npz(copied, tmp_path, capsys):
    output = tmp_path / "new" / "network.npz"
    found = exported(copied, output)
    expected = named_leaves(load_variables(CHECKPOINTS))
    assert found.keys() == expected.keys()
    assert "params/Dense_0/kernel" in found
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    assert capsys.readouterr().out == (
        f"{output}: 7 arrays, 100 bytes, of {copied / 'checkpoints' / '3'}.\n"
    )
    assert [path.name for path in output.parent.iterdir()] == ["network.npz"]


def test_export_to_safetensors(copied, tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    output = tmp_path / "network.safetensors"
    export.export(copied, "best", str(output), None, False)
    found = numpy.load_file(output)
    expected = named_leaves(load_variables(CHECKPOINTS))
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


def test_export_without_the_package(copied, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    output = tmp_path / "network.safetensors"
    with pytest.raises(ConfigError, match="safetensors is not installed; `pip install"):
        export.export(copied, "best", str(output), None, False)
    assert not list(tmp_path.glob("network*"))


def test_types_that_numpy_lacks_are_widened():
    half = np.asarray(jax.numpy.array([1.5, -2.0], jax.numpy.bfloat16))
    widened = export._widened(half)
    assert widened.dtype == np.float32
    np.testing.assert_array_equal(widened, [1.5, -2.0])


def test_export_of_the_folded_network(finished, tmp_path, capsys):
    """Of a run of the MNIST experiment, whose two networks have names."""
    found = exported(finished, tmp_path / "network.npz", fold=True)
    out = capsys.readouterr().out
    assert "baseline: there is no batch normalisation to fold.\n" in out
    assert "BatchNorm_1: folded into Dense_1\n" in out
    plain = exported(finished, tmp_path / "plain.npz")
    assert {name for name in plain if "BatchNorm" in name}
    assert {name for name in found if name.startswith("params/")} == {
        f"params/{network}/Dense_{layer}/{leaf}"
        for network in ("baseline", "batch_norm")
        for layer in range(3)
        for leaf in ("bias", "kernel")
    }
    assert not [name for name in found if name.startswith("batch_stats/")]
    alone = exported(finished, tmp_path / "a.npz", network="batch_norm", fold=True)
    for name in "params/Dense_0/kernel", "params/Dense_1/bias":
        collection, rest = name.split("/", 1)
        np.testing.assert_array_equal(
            alone[name], found[f"{collection}/batch_norm/{rest}"]
        )


@pytest.mark.parametrize("output", [None, "network", "network.h5"])
def test_other_endings_are_refused(copied, output):
    with pytest.raises(ConfigError, match=r"with \.npz, \.safetensors or \.sta"):
        export.export(copied, "newest", output, None, False)


def test_export_of_what_is_not_there_or_damaged(copied, tmp_path):
    output = tmp_path / "network.npz"
    with pytest.raises(CheckpointError, match="no network other: expected one of netw"):
        exported(copied, output, network="other")
    (tmp_path / "file").touch()
    with pytest.raises(WorkdirError, match="cannot write"):
        exported(copied, tmp_path / "file" / "network.npz")
    for part in "params/manifest.ocdbt", "metadata/metadata":
        (copied / "checkpoints" / "3" / part).write_bytes(b"?")
        with pytest.raises(CheckpointError, match=r"3 is damaged \("):
            exported(copied, output)
    assert not output.exists()


# Processes.


def run_command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "experiments.checkpoint", *map(str, arguments)],
        cwd=REPOSITORY,
        env=command_environment(),
        capture_output=True,
        text=True,
        check=False,
    )


def test_help():
    done = run_command("--help")
    assert done.returncode == 0
    assert done.stderr == ""
    assert done.stdout.startswith(documentation_of("checkpoint").splitlines()[0])
    for flag in ("--output:", "--step:", "--network:", "--[no]fold:"):
        assert flag in done.stdout


def test_the_command(copied, tmp_path):
    for action in "inspect", "verify":
        done = run_command(action, copied)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        assert str(copied / "checkpoints" / "3") in done.stdout
    output = tmp_path / "network.npz"
    done = run_command("export", copied, f"--output={output}", "--step=3")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert output.exists()
    damage(copied)
    done = run_command("verify", copied)
    assert done.returncode == 1
    assert "3: damaged, params cannot be read: " in done.stdout
    assert done.stderr.startswith("error: 1 of 1 checkpoints damaged: ")
    assert done.stderr.count("\n") == 1


def test_a_reader_that_has_seen_enough(copied):
    """As `| head` closes the pipe."""
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.checkpoint", "inspect", str(copied)],
        cwd=REPOSITORY,
        env=command_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0
    process.stderr.close()


@pytest.mark.parametrize("place", ["network.npz", "network.npz.partial"])
def test_export_overwrites_no_target_of_a_link(copied, tmp_path, place):
    precious = tmp_path / "precious"
    precious.write_text("somebody's")
    (tmp_path / place).symlink_to(precious)
    assert exported(copied, tmp_path / "network.npz")
    assert precious.read_text() == "somebody's"
    assert not (tmp_path / "network.npz").is_symlink()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "got nothing: expected one of inspect, verify, export, and a folder"),
        (["look", "here"], "got look here: expected one of inspect, verify, export"),
        (["verify", "nowhere"], "nowhere holds no checkpoint: expected a run's workd"),
    ],
)
def test_mistakes_are_answered_with_one_line(arguments, expected):
    done = run_command(*arguments)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {expected}")
    assert done.stderr.count("\n") == 1
