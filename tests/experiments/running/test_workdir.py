import json
import os
import subprocess
import sys

import pytest

from experiments.configuration.fields import Configuration, Field, Role
from experiments.running.workdir import (
    WorkdirError,
    is_same_file,
    open_workdir,
    read_json,
    write_json,
    write_whole,
)
from tests.experiments.helpers import REPOSITORY, read_files

CONFIG = {"rate": 0.5, "hidden": (3, 4), "name": "x"}
CHOICES = Configuration(
    {
        "rate": Field(0.5, "a number"),
        "late": Field(3, "a field that earlier versions lacked"),
        "workers": Field(4, "a number", role=Role.LAUNCH, formerly="threads"),
    },
    lambda variant: {},
)

OPEN_ELSEWHERE = """
import sys
from pathlib import Path
from experiments.configuration.fields import Configuration
from experiments.running.workdir import WorkdirError, open_workdir
try:
    config = {"rate": 0.5, "hidden": (3, 4), "name": "x"}
    open_workdir(Path(sys.argv[1]), config, Configuration({}, lambda variant: {}))
except WorkdirError as error:
    sys.exit(str(error))
"""


def open_elsewhere(workdir) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", OPEN_ELSEWHERE, str(workdir)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )


def error_of(workdir, config=CONFIG) -> str:
    with pytest.raises(WorkdirError) as caught:
        open_workdir(workdir, config, CHOICES)
    message = str(caught.value)
    assert "\n" not in message
    assert "--workdir" in message
    return message


def test_makes_the_folder_with_its_configuration(tmp_path):
    workdir = tmp_path / "a" / "b"
    open_workdir(workdir, CONFIG, CHOICES).close()
    found = read_json(workdir / "config.json")
    assert found == {"rate": 0.5, "hidden": [3, 4], "name": "x"}


def test_same_configuration_goes_on_and_changes_nothing(tmp_path):
    open_workdir(tmp_path, CONFIG, CHOICES).close()
    before = read_files(tmp_path)
    open_workdir(tmp_path, dict(reversed(CONFIG.items())), CHOICES).close()
    assert read_files(tmp_path) == before


def test_lock_keeps_another_process_out_until_it_is_closed(tmp_path):
    with open_workdir(tmp_path, CONFIG, CHOICES):
        other = open_elsewhere(tmp_path)
        assert other.returncode == 1
        assert f"another process is writing to {tmp_path}" in other.stderr
    assert open_elsewhere(tmp_path).returncode == 0


def test_lock_is_released_after_a_refusal(tmp_path):
    open_workdir(tmp_path, CONFIG, CHOICES).close()
    error_of(tmp_path, CONFIG | {"rate": 1.0})
    assert open_elsewhere(tmp_path).returncode == 0


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("kept")
    assert "cannot write to the workdir" in error_of(tmp_path / "file" / "run")
    assert "cannot write to the workdir" in error_of(tmp_path / "file")
    assert read_files(tmp_path) == {"file": b"kept"}


def test_other_configuration_is_refused_with_every_difference(tmp_path):
    open_workdir(tmp_path, CONFIG, CHOICES).close()
    before = read_files(tmp_path)
    message = error_of(tmp_path, {"rate": 0.1, "hidden": (3, 4), "new": None})
    assert "name: x there, absent now; " in message
    # An earlier version did not write it down.
    assert "new" not in message
    assert "rate: 0.5 there, 0.1 now. " in message
    assert "hidden" not in message
    assert read_files(tmp_path) == before


@pytest.mark.parametrize("content", [b"", b'{"rate": 0.', b"[1]", b"\xff\xfe{}"])
def test_damaged_configuration(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    assert f"{path} is damaged (" in error_of(tmp_path)
    assert path.read_bytes() == content


def test_read_json_gives_back_what_was_written(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": (1, None)})
    assert read_json(path) == read_json(path, ["a"]) == {"a": [1, None]}


def test_read_json_refuses_another_object(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {})
    with pytest.raises(WorkdirError, match=f"{path} lacks a, b: expected that of a"):
        read_json(path, ["a", "b"])


def test_a_deleted_lock_lets_nobody_in(tmp_path):
    with open_workdir(tmp_path, CONFIG, CHOICES):
        (tmp_path / ".lock").unlink()
        assert "another process is writing" in open_elsewhere(tmp_path).stderr


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "kept").write_text("all of it")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "kept")
    assert "it is a symbolic link; remove it" in error_of(tmp_path / "run")
    assert (tmp_path / "kept").read_text() == "all of it"


def test_a_file_is_known_by_more_than_its_name(tmp_path):
    path = tmp_path / "x"
    with path.open("w") as file:
        assert is_same_file(file, path)
        path.rename(tmp_path / "y")
        assert not is_same_file(file, path)
        path.write_text("")
        assert not is_same_file(file, path)


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_write_whole_leaves_the_old_content_when_it_fails(
    tmp_path, monkeypatch, function
):
    path = tmp_path / "file"
    write_whole(path, "old")
    assert read_files(tmp_path) == {"file": b"old"}

    def fail(*_: object) -> None:
        raise OSError("disk full")

    owner = os if function == "fsync" else type(path)
    with monkeypatch.context() as patch:
        patch.setattr(owner, function, fail)
        with pytest.raises(OSError, match="disk full"):
            write_whole(path, "new")
    assert path.read_text() == "old"
    write_whole(path, "new")
    assert read_files(tmp_path) == {"file": b"new"}


def test_write_whole_is_on_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(os, "fsync", lambda _: seen.append("fsync"))
    replace = type(tmp_path).replace

    def record(path, target):
        seen.append(path.read_text())
        return replace(path, target)

    monkeypatch.setattr(type(tmp_path), "replace", record)
    write_whole(tmp_path / "file", "content")
    assert seen == ["fsync", "content"]


def test_what_another_start_may_change_and_what_earlier_versions_lacked(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"rate": 0.5, "threads": 16}))
    open_workdir(tmp_path, {"rate": 0.5, "late": 3, "workers": 2}, CHOICES).close()
    message = error_of(tmp_path, {"rate": 0.5, "late": 4, "workers": 4})
    assert "late: 3 there, 4 now." in message
