"""Hostile files, given to the commands that a user types: docs/reliability.md has more.

The matrices of what such files may hold are in `data/test_hostile_*.py`.
"""

import json
import subprocess
import sys

import pytest

from experiments.inception import training
from tests.experiments.data.imagenet_shaped import make_archives, train_images
from tests.experiments.data.prepared_sets import encode_png, prepare_set
from tests.experiments.data.test_hostile_archives import (
    END,
    IMAGES,
    MEMBERS,
    archive,
)
from tests.experiments.data.test_hostile_images import HOSTILE
from tests.experiments.helpers import REPOSITORY, command_environment
from tests.experiments.inception.tiny_inception import TinyInception, tiny_config
from tests.experiments.process_group import free_port

pytestmark = pytest.mark.slow


def run(module, *arguments, cwd=REPOSITORY):
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=cwd,
        env=command_environment(PYTHONPATH=str(REPOSITORY)),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def error_of(*arguments, **options):
    done = run(*arguments, **options)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return line


def test_training_and_evaluating_among_images_that_would_take_all_memory(
    tmp_path, capsys
):
    """In place of Inception a network of seconds; the rest is as in any run of it."""
    import tensorflow_datasets as tfds

    hostile = ["markers", "long and thin", "32000 x 32000", "65500 x 65500"]
    images = [(f"{name}.JPEG", HOSTILE[name]) for name in hostile]
    images += [(image.file_name, image.content) for image in train_images(28, False, 0)]
    examples = [
        {"image": content, "label": number % 2, "file_name": name}
        for number, (name, content) in enumerate(images)
    ]
    features = {
        "image": tfds.features.Image(encoding_format="jpeg"),
        "label": tfds.features.ClassLabel(num_classes=2),
        "file_name": tfds.features.Text(),
    }
    prepare_set(tmp_path, {"train": examples, "test": examples}, features)
    config = tiny_config(
        dataset="tiny", eval_examples=32, batch_size=32, max_undecodable=8, workers=1
    )
    training.run(config, tmp_path / "run", str(tmp_path), network=TinyInception)
    out = capsys.readouterr().out
    assert "8 images could not be decoded" in out  # four of each split
    for name in hostile:
        assert out.count(f"({name}.JPEG): ") == 2


@pytest.mark.parametrize("name", ["loop of links", "2^62 bytes in pax headers"])
def test_preparing_archives_of_something_else(tmp_path, name):
    make_archives(tmp_path, num_train=9, num_validation=5)
    path = tmp_path / "ILSVRC2012_img_train.tar"
    path.write_bytes(archive(IMAGES + MEMBERS[name] + END))
    line = error_of(
        *("experiments.prepare", "imagenet2012", "--check=none"),
        *(f"--manual_dir={tmp_path}", f"--data_dir={tmp_path / 'sets'}"),
    )
    assert f"archive {path} is damaged, or not ImageNet's" in line


def test_metadata_with_code_of_the_current_folder(tmp_path):
    import numpy as np
    import tensorflow_datasets as tfds

    image = encode_png(np.zeros((6, 5, 3), np.uint8))
    examples = [{"image": image, "label": 0}]
    features = {
        "image": tfds.features.Image(shape=(6, 5, 3)),
        "label": tfds.features.ClassLabel(num_classes=2),
    }
    directory = prepare_set(tmp_path, {"train": examples, "test": examples}, features)
    path = directory / "features.json"
    content = json.loads(path.read_text()) | {"pythonClassName": "foreign.Image"}
    path.write_text(json.dumps(content))
    (tmp_path / "foreign.py").write_text("open('was_run', 'w')")
    line = error_of(
        *("experiments.mnist", "--config.dataset=tiny", f"--data_dir={tmp_path}"),
        f"--workdir={tmp_path / 'run'}",
        cwd=tmp_path,
    )
    assert "names 'foreign.Image', no feature of TFDS" in line
    assert not (tmp_path / "was_run").exists()


def test_a_lock_that_is_a_link(tmp_path):
    (tmp_path / "precious").write_text("somebody's")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "precious")
    line = error_of("experiments.mnist", f"--workdir={tmp_path / 'run'}")
    assert "it is a symbolic link; remove it" in line
    assert (tmp_path / "precious").read_text() == "somebody's"


CONNECT = """
import sys
from pathlib import Path
from experiments.distributed.processes import Address, start
address, number = sys.argv[1], int(sys.argv[2])
start("on", Address(address, 2, number), 60, 60)
port = f"{int(address.rpartition(':')[2]):04X}"
listening = "0A"
for table in ("tcp", "tcp6"):
    for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
        _, place, _, state, *_ = line.split()
        if state == listening and place.endswith(f":{port}"):
            print("listening at", place.rpartition(":")[0])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's table of sockets")
def test_the_coordinator_listens_where_it_was_told_to():
    address = f"localhost:{free_port()}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CONNECT, address, str(number)],
            cwd=REPOSITORY,
            env=command_environment(),
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    listening = [line for line in outputs[0].splitlines() if "listening" in line]
    assert listening
    # 127.0.0.1, as such and as an address of IPv6, and ::1, as Linux writes them.
    assert {line.split()[-1] for line in listening} <= {
        *("0100007F", "0000000000000000FFFF00000100007F"),
        "00000000000000000000000001000000",
    }
