"""What lies in the place of a file that is to be written is never written through."""

import os
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments.checkpoints import export
from experiments.configuration.fields import Configuration
from experiments.data.errors import DataError
from experiments.data.new_directory import temporary_directory
from experiments.running import figures
from experiments.running.new_files import create, no_link, whole_file
from experiments.running.workdir import WorkdirError, open_workdir, write_whole

PRECIOUS = b"somebody's"
CONFIGURATION = Configuration({}, lambda variant: {})


@pytest.fixture
def precious(tmp_path):
    path = tmp_path / "precious"
    path.write_bytes(PRECIOUS)
    return path


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    return path


LINKS = {
    "symbolic link": lambda path, target: path.symlink_to(target),
    "dangling link": lambda path, target: path.symlink_to(target.with_name("none")),
    "hard link": lambda path, target: path.hardlink_to(target),
    "loop": lambda path, target: path.symlink_to(path.name),
    "pipe": lambda path, target: os.mkfifo(path),
}


def write_text(folder: Path) -> Path:
    write_whole(folder / "file", "written")
    return folder / "file"


def write_log(folder: Path) -> Path:
    with create(folder / "file") as file:
        file.write(b"written")
    return folder / "file"


def write_figure(folder: Path) -> Path:
    figures.save(Figure(), folder / "file")
    return folder / "file.png"


def write_arrays(folder: Path) -> Path:
    path = folder / "file.npz"
    with whole_file(path) as file:
        export.WRITERS[".npz"](file, {"a": np.zeros(2)}, {})
    return path


WRITTEN = {
    "text": (write_text, "file"),
    "log": (write_log, "file"),
    "figure": (write_figure, "file.png"),
    "arrays": (write_arrays, "file.npz"),
}


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("written", WRITTEN)
@pytest.mark.parametrize("suffix", ["", ".partial"])
def test_files_take_the_place_of_links(folder, precious, link, written, suffix):
    write, name = WRITTEN[written]
    LINKS[link](folder / (name + suffix), precious)
    path = write(folder)
    assert path.is_file()
    assert not path.is_symlink()
    assert path.stat().st_nlink == 1
    assert path.stat().st_size > 0
    assert precious.read_bytes() == PRECIOUS
    assert not precious.with_name("none").exists()


@pytest.mark.parametrize("link", LINKS)
def test_locks_are_not_taken_through_links(folder, precious, link):
    LINKS[link](folder / ".lock", precious)
    if link == "hard link":  # another name is no other place, and nothing is emptied
        open_workdir(folder, {}, CONFIGURATION).close()
        with temporary_directory(folder / "new", "set"):
            pass
    else:
        with pytest.raises(WorkdirError, match="cannot write to the workdir"):
            open_workdir(folder, {}, CONFIGURATION)
        with (
            pytest.raises(OSError, match=r"\.lock"),
            temporary_directory(folder / "new", "set"),
        ):
            pass
        assert not (folder / "config.json").exists()
    assert precious.read_bytes() == PRECIOUS
    assert not precious.with_name("none").exists()


def test_a_folder_to_be_new_that_is_a_link(folder, tmp_path):
    (folder / "new").symlink_to(tmp_path)
    with (
        pytest.raises(DataError, match="is in the way"),
        temporary_directory(folder / "new", "set"),
    ):
        pass
    assert (folder / "new").is_symlink()


def test_rows_are_added_to_a_file_and_to_no_link(folder, precious):
    for _ in range(2):
        with open(folder / "rows", "a", opener=no_link) as file:
            file.write("row\n")
    assert (folder / "rows").read_text() == "row\nrow\n"
    (folder / "link").symlink_to(precious)
    with pytest.raises(OSError, match="symbolic link"):
        no_link(str(folder / "link"), os.O_WRONLY)
    assert precious.read_bytes() == PRECIOUS


def test_a_failure_leaves_what_was_there(folder):
    write_text(folder)

    def fail():
        with whole_file(folder / "file") as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [path.name for path in folder.iterdir()] == ["file"]
    assert (folder / "file").read_text() == "written"
