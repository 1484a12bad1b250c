"""The command line as a user meets it: every test here starts processes."""

import subprocess
import sys

import pytest

from experiments.mnist.config import FIELDS
from tests.experiments.helpers import (
    REPOSITORY,
    command_environment,
    documentation_of,
    run_command,
)

# A run of a second, should one of the mistakes below not be noticed.
QUICK = (
    "--config.num_steps=1",
    "--config.num_seeds=1",
    "--config.population_batches=1",
    "--config.probe_examples=0",
)


def error_of(tmp_path, *arguments: str, **variables: str) -> str:
    """The one line that a mistake is answered with."""
    workdir = tmp_path / "run"
    done = run_command(*QUICK, f"--workdir={workdir}", *arguments, **variables)
    assert done.returncode == 1, arguments
    assert done.stderr.startswith("error: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stdout == ""
    assert not workdir.exists()
    return done.stderr.removeprefix("error: ").rstrip("\n")


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help(flag):
    done = run_command(flag)
    assert done.returncode == 0
    assert done.stderr == ""
    assert done.stdout.startswith(documentation_of("mnist").splitlines()[0])
    text = " ".join(done.stdout.split())
    for key, field in FIELDS.items():
        assert f"--config.{key}=" in text
        assert field.help in text
    for name in ("--workdir: ", "--data_dir: ", "--config=FILE[:VARIANT]"):
        assert name in done.stdout


# Whatever `python -m experiments.NAME` answers to.
COMMANDS = sorted(
    {path.stem for path in REPOSITORY.glob("experiments/[!_]*.py")}
    | {path.parent.name for path in REPOSITORY.glob("experiments/*/__main__.py")}
)
ANSWER = """
import runpy, sys
command = sys.argv[1]
sys.argv[1:] = ["--help"]
try:
    runpy.run_module(f"experiments.{command}", run_name="__main__", alter_sys=True)
finally:
    print("jax" in sys.modules, file=sys.stderr)
"""


@pytest.mark.parametrize("command", COMMANDS)
def test_help_does_not_wait_for_jax_and_is_80_columns_wide(command):
    done = subprocess.run(
        [sys.executable, "-c", ANSWER, command],
        cwd=REPOSITORY,
        env=command_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    assert done.stderr == "False\n"
    lines = [line for line in done.stdout.splitlines() if str(REPOSITORY) not in line]
    assert f"python -m experiments.{command}" in done.stdout
    assert [line for line in lines if len(line) > 80] == []


@pytest.mark.parametrize("key", ["learning_rat", "hidden.x", "mlp"])
def test_unknown_key_lists_those_there_are(tmp_path, key):
    message = error_of(tmp_path, f"--config.{key}=3")
    assert message.startswith(f"unknown configuration key {key}; the keys are ")
    assert message.endswith(" Did you mean learning_rate?") == (key == "learning_rat")
    assert all(key in message for key in FIELDS)


@pytest.mark.parametrize(
    ("argument", "expected"),
    {
        "--config.num_steps=abc": "num_steps=abc: expected a whole number, got 'abc'",
        "--config.num_steps=1.5": "num_steps=1.5: expected a whole number, got '1.5'",
        "--config.learning_rate=fast": "expected a number, got 'fast'",
        "--config.binarise=maybe": "--config.binarise=maybe",
        "--config.num_steps": "Missing value for flag --config.num_steps",
        "--nosuch=3": "Unknown command line flag 'nosuch'",
        "extra": "unexpected argument 'extra'",
    }.items(),
)
def test_mistyped_arguments(tmp_path, argument, expected):
    message = error_of(tmp_path, argument)
    assert expected in message
    assert "--help" in message


@pytest.mark.parametrize(
    ("argument", "expected"),
    {
        "--config.num_steps=0": "num_steps=0: expected at least 1",
        "--config.batch_size=70000": "more than the 60000 training examples",
        "--config.dataset=nosuch": "'nosuch' is unknown",
    }.items(),
)
def test_values_that_make_no_sense(tmp_path, argument, expected):
    assert expected in error_of(tmp_path, argument)


def test_batch_that_does_not_divide_over_the_devices(tmp_path):
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    message = error_of(tmp_path, **flags)
    assert "--config.batch_size=64" in message


def test_missing_data_directory(tmp_path):
    message = error_of(tmp_path, f"--data_dir={tmp_path / 'none'}")
    assert "'mnist' is not prepared in" in message


def test_unwritable_workdir(tmp_path):
    (tmp_path / "file").write_text("kept")
    message = error_of(tmp_path, f"--workdir={tmp_path / 'file' / 'run'}")
    assert "cannot write to the workdir" in message
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize(
    ("argument", "expected"),
    {
        "--workdir=": "--workdir= is empty: expected a folder; is a variable not set?",
        "--data_dir= ": "--data_dir= is empty",
        "--workdir=gs://bucket/run": "--workdir=gs://bucket/run: expected a folder of",
        "--data_dir=s3://bucket/data": "mount the bucket",
    }.items(),
)
def test_folders_that_are_none_of_this_machine(tmp_path, argument, expected):
    assert expected in error_of(tmp_path, argument)


def test_a_home_folder_is_that_of_the_user(tmp_path):
    (tmp_path / "runs").write_text("a file")
    message = error_of(tmp_path, "--workdir=~/runs/a", HOME=str(tmp_path))
    assert f"cannot write to the workdir {tmp_path / 'runs' / 'a'}" in message
    message = error_of(tmp_path, "--data_dir=~/none", HOME=str(tmp_path))
    assert f"not prepared in {tmp_path / 'none'}" in message


def test_a_name_alone_makes_no_variant(tmp_path):
    done = run_command(
        "--config.variant=bn_x5",
        f"--workdir={tmp_path / 'run'}",
        module="experiments.inception",
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: --config.variant only names a model")
    assert "choose one of the variants with --config=VARIANT" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    {
        "def get_config(:": "SyntaxError",
        "import nosuchmodule": "nosuchmodule",
        "x = 1": "get_config",
        "def get_config(): return 3": "keys",
        "def get_config(): raise KeyError('lost')": "lost",
        "from ml_collections import ConfigDict\n"
        "def get_config(): return ConfigDict({k: 1 for k in "
        f"{[key for key in FIELDS if key != 'decay']}}})": "lacks decay",
    }.items(),
)
def test_broken_configuration_file(tmp_path, content, expected):
    path = tmp_path / "mine.py"
    path.write_text(content + "\n")
    done = run_command(f"--config={path}", f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert expected in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["none.py", "experiments/configs/mnist.py:rate"])
def test_missing_configuration_file_or_variant(tmp_path, name):
    done = run_command(f"--config={name}", f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_run_says_little_and_leaves_a_finished_workdir(tmp_path):
    workdir = f"--workdir={tmp_path / 'run'}"
    done = run_command(*QUICK, workdir)
    assert done.returncode == 0
    # A progress bar, and nothing of what the libraries log.
    assert "1/1" in done.stderr
    lines = [line for line in done.stderr.splitlines() if "/1 [" not in line]
    assert "".join(lines) == ""
    assert "Alg. 2" in done.stdout
    assert (tmp_path / "run" / "figure1.png").exists()
    again = run_command(*QUICK, workdir)
    assert again.returncode == 0
    assert again.stderr == ""
    assert "finished; nothing to do" in again.stdout


def test_without_data_it_points_to_images_that_need_none(tmp_path):
    done = run_command(
        f"--data_dir={tmp_path}",
        f"--workdir={tmp_path / 'run'}",
        module="experiments.inception",
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: data set 'imagenet2012' is not prepared")
    assert done.stderr.endswith("-m experiments.inception --config=bn_x5,small\n")


def test_a_dry_run_writes_nothing(tmp_path):
    """By its short name."""
    done = run_command(*QUICK, "--dry_run", f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Dry run: nothing was written.")
    assert not (tmp_path / "run").exists()
