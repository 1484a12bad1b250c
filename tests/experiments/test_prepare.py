"""The command line as a user meets it: every test here starts processes."""

import subprocess
import sys

import numpy as np
import pytest

from experiments.data.prepared_splits import load_prepared_splits
from experiments.data.splits import Augmentation
from tests.experiments.data.imagenet_shaped import make_archives
from tests.experiments.data.prepared_sets import encode_png
from tests.experiments.helpers import (
    REPOSITORY,
    command_environment,
    documentation_of,
)


def run_prepare(*arguments, **variables):
    return subprocess.run(
        [sys.executable, "-m", "experiments.prepare", *arguments],
        cwd=REPOSITORY,
        env=command_environment(**variables),
        capture_output=True,
        text=True,
        check=False,
    )


def error_of(*arguments):
    """The one line that a mistake is answered with, and what is printed before."""
    done = run_prepare(*arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("error: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr.removeprefix("error: ").rstrip("\n"), done.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["imagenet2012", "-h"]])
def test_help(arguments):
    done = run_prepare(*arguments)
    assert done.returncode == 0
    assert done.stderr == ""
    documented = documentation_of("prepare").split()  # other lines, the same words
    assert done.stdout.split()[: len(documented)] == documented
    for flag in ("--data_dir: ", "--manual_dir: ", "--image_dir: ", "--check: "):
        assert flag in done.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "got 0 names of data sets: expected one"),
        (("cifar10", "mnist"), "got 2 names of data sets: expected one"),
        (("imagenet2012", "--nosuch=1"), "Unknown command line flag 'nosuch'"),
        (("imagenet2012", "--check=md5"), "flag --check=md5"),
        (("imagenet2012", "--check"), "Missing value for flag --check"),
    ],
)
def test_mistyped_arguments(arguments, expected):
    message, output = error_of(*arguments)
    assert expected in message
    assert message.endswith("(see --help)")
    assert output == ""


def test_archives_that_are_not_official(tmp_path):
    make_archives(tmp_path / "archives", num_train=9, num_validation=5)
    message, output = error_of(
        f"--manual_dir={tmp_path}/archives", "imagenet2012", f"--data_dir={tmp_path}/to"
    )
    assert "ILSVRC2012_img_train.tar has" in message
    assert output.startswith(f"expected:\n{tmp_path}/archives/\n├── ILSVRC2012")
    assert not (tmp_path / "to").exists()


def test_unwritable_data_dir(tmp_path):
    make_archives(tmp_path, num_train=9, num_validation=5)
    (tmp_path / "file").touch()
    message, _ = error_of(
        *("imagenet2012", f"--manual_dir={tmp_path}", "--check=none"),
        f"--data_dir={tmp_path}/file/sets",
    )
    assert "Not a directory" in message


def test_part_of_imagenet(tmp_path):
    make_archives(tmp_path, num_train=9, num_validation=5)
    arguments = ("imagenet2012", "--check=none", f"--manual_dir={tmp_path}")
    done = run_prepare(*arguments, TFDS_DATA_DIR=f"{tmp_path}/sets")
    assert done.returncode == 0, done.stderr
    assert "train: 9 images" in done.stdout
    assert "9/9" in done.stderr  # a progress bar
    augmentation = Augmentation(16, 1, False, 0.875)
    train, validation = load_prepared_splits(
        "imagenet2012", f"{tmp_path}/sets", augmentation
    )
    assert (len(train), len(validation)) == (9, 5)
    again = run_prepare(*arguments, f"--data_dir={tmp_path}/sets")
    assert again.returncode == 0
    assert again.stderr == ""
    assert "already prepared" in again.stdout


def test_own_images(tmp_path):
    """Through processes of its own, one of whose images is broken."""
    for number, name in enumerate(("cat", "dog")):
        (tmp_path / "in" / name).mkdir(parents=True)
        for index in range(20):
            content = encode_png(np.full((4, 4, 3), 20 * number + index, np.uint8))
            (tmp_path / "in" / name / f"{index}.png").write_bytes(content)
    (tmp_path / "in" / "cat" / "0.png").write_bytes(b"broken")
    arguments = ("own", f"--image_dir={tmp_path}/in", f"--data_dir={tmp_path}/sets")
    done = run_prepare(*arguments, "--held_out=0.3")
    assert done.returncode == 0, done.stderr
    assert "could not be read: 1, as cat/0.png: neither a JPEG nor a PNG" in done.stdout
    assert "40/40" in done.stderr
    augmentation = Augmentation(16, 1, False, 0.875)
    train, held = load_prepared_splits("own", f"{tmp_path}/sets", augmentation)
    assert len(train) + len(held) == 39
    message, _ = error_of(*arguments, "--held_out=2")
    assert "--held_out=2" in message
