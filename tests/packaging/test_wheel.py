"""What `pip install bn-jax` brings: a wheel of bn_jax alone, and nothing but JAX."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
BUILD = """
import sys, hatchling.build
print(hatchling.build.build_wheel(sys.argv[1]))
print(hatchling.build.build_sdist(sys.argv[1]))
"""
MODULES = {path.stem for path in (REPOSITORY / "bn_jax").glob("*.py")} - {"__init__"}
# The adapters, which import Flax; drop_in is what they share.
FLAX_MODULES = {name for name in MODULES if name.startswith(("linen", "nnx"))}
CORE_MODULES = MODULES - FLAX_MODULES - {"drop_in"}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel and the archive of sources."""
    folder = tmp_path_factory.mktemp("built")
    done = subprocess.run(
        [sys.executable, "-c", BUILD, folder],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    return [folder / name for name in done.stdout.split()]


@pytest.fixture(scope="module")
def metadata(built):
    with zipfile.ZipFile(built[0]) as wheel:
        (name,) = [name for name in wheel.namelist() if name.endswith("/METADATA")]
        return Parser().parsestr(wheel.read(name).decode())


def test_the_wheel_holds_the_library_alone(built):
    with zipfile.ZipFile(built[0]) as wheel:
        held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    package = REPOSITORY / "bn_jax"
    sources = [*package.rglob("*.py"), package / "py.typed"]
    assert held == {str(path.relative_to(REPOSITORY)) for path in sources}


def test_the_wheel_needs_jax_and_numpy_alone(metadata):
    required = {
        re.match(r"[\w.-]+", line)[0]
        for line in metadata.get_all("Requires-Dist")
        if "extra ==" not in line
    }
    assert required == {"jax", "numpy"}


def test_the_extras(metadata):
    assert set(metadata.get_all("Provides-Extra")) >= {
        *("flax", "experiments", "imagenet", "safetensors"),
        *("test", "peers", "benchmarks", "docs", "dev"),
    }


def test_the_archive_holds_all_that_git_knows(built):
    if not (REPOSITORY / ".git").exists():
        pytest.skip("not in a clone: there is nothing to compare with")
    known = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    expected = {name for name in known if name and (REPOSITORY / name).exists()}
    with tarfile.open(built[1]) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert held - {"PKG-INFO"} == expected


def test_the_changelog_has_the_version(metadata):
    versions = re.findall(
        r"^## (\d\S*),", (REPOSITORY / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    assert versions[0] == metadata["Version"]


def run(*command, **options):
    """Runs a command that finds no clone by the variables of this process."""
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [str(word) for word in command],
        env=kept,
        capture_output=True,
        text=True,
        **options,
    )


@pytest.fixture(scope="module")
def environment(tmp_path_factory, built):
    """A Python with the wheel and JAX, and nothing else."""
    folder = tmp_path_factory.mktemp("user")
    run(sys.executable, "-m", "venv", folder, check=True)
    python = folder / "bin/python"
    # By itself, so that a wheel that asks for too much is no reason to skip.
    fetched = run(python, "-m", "pip", "install", "jax", check=False)
    if fetched.returncode:
        pytest.skip(f"no package registry answers: {fetched.stderr.splitlines()[-1]}")
    run(python, "-m", "pip", "install", built[0], check=True)
    return folder


def packages(environment):
    listed = run(environment / "bin/python", "-m", "pip", "list", "--format=freeze")
    names = {line.partition("==")[0] for line in listed.stdout.splitlines()}
    return names - {"pip", "setuptools"}


def in_environment(environment, code):
    """Runs a program as a user would, away from the clone."""
    return run(environment / "bin/python", "-c", code, cwd=environment, check=False)


def importing(names):
    lines = [f"import bn_jax.{name}" for name in sorted(names)]
    return "\n".join(["import bn_jax", *lines])


@pytest.mark.slow
def test_an_environment_with_jax_alone(environment):
    assert len(packages(environment)) <= 7
    done = in_environment(environment, importing(CORE_MODULES))
    assert done.returncode == 0, done.stderr
    assert in_environment(environment, "import experiments").returncode == 1
    for name in FLAX_MODULES:
        done = in_environment(environment, importing([name]))
        assert "No module named 'flax'" in done.stderr


USER = """\
import jax
import numpy as np

import bn_jax
from bn_jax.linen import BatchNorm

params, stats = bn_jax.init_params(4), bn_jax.init_stats(4)
x = np.ones((8, 4), np.float32)
y, stats = bn_jax.batch_norm(params, stats, x, train=True, activation="relu")
y, _ = bn_jax.batch_norm(params, stats, x, train=False, weights=np.ones((8, 1)))
shown: jax.Array = y
moments: bn_jax.Moments = bn_jax.moments(x)
kernel, bias = bn_jax.fold_dense(np.ones((3, 4)), None, params, stats, eps=1e-5)
norm = BatchNorm(use_running_average=False, activation="gelu")
"""
WRONG = """\
import numpy as np

import bn_jax

params, stats = bn_jax.init_params(4), bn_jax.init_stats(4)
x = np.ones((8, 4), np.float32)
bn_jax.batch_norm(params, stats, x, train=True, epsilon=1e-5)
bn_jax.batch_norm(params, stats, x, train=True, activation="rellu")
bn_jax.batch_norm(params, stats, x)
"""


@pytest.mark.slow
def test_with_flax_and_type_checkers(environment, tmp_path):
    python = environment / "bin/python"
    needed = ["flax", "mypy", "pyright[nodejs]"]
    run(python, "-m", "pip", "install", *needed, check=True)
    done = in_environment(environment, importing(FLAX_MODULES))
    assert done.returncode == 0, done.stderr
    user, wrong = tmp_path / "user.py", tmp_path / "wrong.py"
    user.write_text(USER)
    wrong.write_text(WRONG)
    for checker in (["mypy", "--strict"], ["pyright", "--pythonpath", python]):
        command = [python, "-m", *checker]
        done = run(*command, user, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        done = run(*command, wrong, cwd=tmp_path)
        lines = {int(line) for line in re.findall(r"wrong\.py:(\d+)", done.stdout)}
        assert lines == {7, 8, 9}, done.stdout + done.stderr
    done = run(python, user)
    assert done.returncode == 0, done.stderr
