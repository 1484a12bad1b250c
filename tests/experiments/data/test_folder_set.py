import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from experiments.data import folder_set
from experiments.data.datasets import load_splits
from experiments.data.errors import DataError
from experiments.data.folder_set import prepare_folders
from experiments.data.folder_shards import write_shard
from experiments.data.image_folders import find_images
from experiments.data.metadata import choose_features, parse_example, read_info
from experiments.data.prepared import load_prepared
from experiments.data.records import read_file
from experiments.inception import training as inception_training
from experiments.inception.comparison.runs import read_runs
from experiments.inception.ensembles import errors, trained_networks
from experiments.mnist import training as mnist_training
from experiments.running.workdir import read_json
from tests.experiments.data.prepared_sets import encode_png
from tests.experiments.helpers import read_files, small_config
from tests.experiments.inception.tiny_inception import TinyInception, tiny_config


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """Shards are written here: a process takes seconds to start."""

    class Pool:
        map = staticmethod(map)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(folder_set, "core_processes", lambda most: Pool())


def make_image(number: int, size=(9, 7)) -> bytes:
    image = np.random.default_rng(number).integers(0, 256, (*size, 3), np.uint8)
    return encode_png(image)


def make_folder(directory: Path, classes, count: int, first: int = 0) -> None:
    for number, name in enumerate(classes):
        (directory / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            content = make_image(first + 1000 * number + index)
            (directory / name / f"{index}.png").write_bytes(content)


def report_of(data_dir: Path, version="1.0.0", name="own") -> dict:
    return json.loads((data_dir / name / version / "report.json").read_text())


def names_of(data_dir: Path, split: str, name="own") -> dict[str, bytes]:
    info = read_info(name, str(data_dir))
    features = choose_features(name, info)
    found = {}
    for path, length in zip(
        info.splits[split].filepaths, info.splits[split].shard_lengths, strict=True
    ):
        for record in read_file(path, length, "array_record"):
            example = parse_example(record, features)
            label = info.features["label"].int2str(example.label)
            found[f"{label}: {example.file_name}"] = example.image
    return found


def test_every_image_is_in_one_split_under_its_class(tmp_path):
    make_folder(tmp_path / "in", ("cat", "dog", "owl"), 40)
    prepare_folders("own", tmp_path / "in", tmp_path / "out", held_out=0.25)
    train = names_of(tmp_path / "out", "train")
    held = names_of(tmp_path / "out", "validation")
    assert not train.keys() & held.keys()
    assert train | held == {
        f"{name.split('/')[0]}: {name}": content
        for name, content in read_files(tmp_path / "in").items()
    }
    assert 15 <= len(held) <= 45  # five deviations
    images = load_prepared("own", str(tmp_path / "out"))
    assert images.num_classes == 3
    assert images.train_images.shape == (len(train), 9, 7, 3)
    # More images leave those that are there where they are.
    make_folder(tmp_path / "in", ("cat", "dog", "owl"), 60)
    prepare_folders("own", tmp_path / "in", tmp_path / "more", held_out=0.25)
    assert held.keys() <= names_of(tmp_path / "more", "validation").keys()
    assert train.keys() <= names_of(tmp_path / "more", "train").keys()


def test_tfds_reads_the_set(tmp_path):
    import tensorflow_datasets as tfds

    make_folder(tmp_path / "in" / "train", ("b", "a"), 4)
    make_folder(tmp_path / "in" / "val", ("a",), 2, first=50)
    prepare_folders("own", tmp_path / "in", tmp_path / "out")
    builder = tfds.builder_from_directory(tmp_path / "out" / "own" / "1.0.0")
    assert builder.info.features["label"].names == ["a", "b"]
    assert builder.info.splits["train"].num_examples == 8
    source = builder.as_data_source("validation")
    for example in source:
        path = tmp_path / "in" / example["file_name"].decode()
        expected = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
        np.testing.assert_array_equal(example["image"], expected)
        assert example["label"] == 0


def test_what_is_no_image_is_reported(tmp_path):
    make_folder(tmp_path / "in" / "train", ("a", "b"), 3)
    make_folder(tmp_path / "in" / "val", ("a", "b"), 2, first=50)
    a = tmp_path / "in" / "train" / "a"
    (a / "half.png").write_bytes(make_image(99)[:-20])
    (a / "notes.txt").write_text("mine")
    (a / "empty.jpg").touch()
    (a / ".hidden").touch()
    os.mkfifo(a / "pipe")
    (a / "gone").symlink_to("nowhere")
    (a / "more").mkdir()
    (a / "more" / "deep.png").write_bytes(make_image(98, (5, 5)))
    (tmp_path / "in" / "val" / "b" / "copy.png").write_bytes(make_image(0))
    (tmp_path / "in" / "spare").mkdir()
    prepare_folders("own", tmp_path / "in", tmp_path / "out")
    report = report_of(tmp_path / "out")
    assert report["classes"] == {
        "a": {"train": 4, "validation": 2},
        "b": {"train": 3, "validation": 3},
    }
    assert {Path(name).name for name in report["unreadable"]} == {
        *("half.png", "notes.txt", "empty.jpg")
    }
    assert report["left_out"].keys() == {"train/a/pipe", "train/a/gone", "spare"}
    assert report["duplicates"] == [["train/a/0.png", "val/b/copy.png"]]
    assert report["in_several_splits"] == report["in_several_classes"] == 1
    info = read_info("own", str(tmp_path / "out"))
    assert info.features["image"].shape == (None, None, 3)


@pytest.mark.parametrize("stop_after", [0, 1, 2, 3])
def test_a_stopped_run_goes_on(tmp_path, monkeypatch, stop_after):
    make_folder(tmp_path / "in", ("a", "b"), 12)
    monkeypatch.setattr("experiments.data.folder_shards._BYTES_PER_SHARD", 1500)
    prepare_folders("own", tmp_path / "in", tmp_path / "whole", held_out=0.4)
    calls = []

    def stopping(*arguments):
        if len(calls) == stop_after:
            raise KeyboardInterrupt
        calls.append(arguments[1].path.name)
        return write_shard(*arguments)

    monkeypatch.setattr(folder_set, "write_shard", stopping)
    with pytest.raises(KeyboardInterrupt):
        prepare_folders("own", tmp_path / "in", tmp_path / "out", held_out=0.4)
    with pytest.raises(DataError, match="unknown to TFDS"):
        read_info("own", str(tmp_path / "out"))
    before = list(calls)
    stop_after = -1
    prepare_folders("own", tmp_path / "in", tmp_path / "out", held_out=0.4)
    assert len(calls) == len(set(calls)) > len(before)
    assert read_files(tmp_path / "out") == read_files(tmp_path / "whole")
    assert not (tmp_path / "out" / "own" / ".preparing").exists()


def test_other_images_start_again_and_are_another_set(tmp_path, monkeypatch, capsys):
    make_folder(tmp_path / "in", ("a", "b"), 12)

    def broken(*_):
        raise OSError("disk")

    with monkeypatch.context() as patch:
        patch.setattr(folder_set, "_finish", broken)
        with pytest.raises(OSError, match="disk"):
            prepare_folders("own", tmp_path / "in", tmp_path / "out", held_out=0.4)
    (tmp_path / "in" / "a" / "0.png").write_bytes(make_image(7777))
    prepare_folders("own", tmp_path / "in", tmp_path / "out", held_out=0.4)
    assert make_image(7777) in {
        *names_of(tmp_path / "out", "train").values(),
        *names_of(tmp_path / "out", "validation").values(),
    }
    capsys.readouterr()
    prepare_folders("own", tmp_path / "in", tmp_path / "out", held_out=0.4)
    assert "already prepared" in capsys.readouterr().out
    make_folder(tmp_path / "in", ("c",), 3)
    with pytest.raises(DataError, match="made of other images"):
        prepare_folders("own", tmp_path / "in", tmp_path / "out", held_out=0.4)


@pytest.mark.parametrize("val", ["flat", "folders", "listed"])
def test_extracted_imagenet(tmp_path, val):
    import tensorflow_datasets as tfds

    names = tfds.core.tfds_path(folder_set.VALIDATION_LABELS).read_text().split()
    root = tmp_path / "in"
    make_folder(root / "train", (names[0], names[1]), 3)
    listing = ["ImageId,PredictionString"]
    for number in (1, 2):
        folder = root / "val" / (names[number - 1] if val == "folders" else "")
        folder.mkdir(parents=True, exist_ok=True)
        name = f"ILSVRC2012_val_{number:08}"
        (folder / f"{name}.JPEG").write_bytes(make_image(100 + number))
        # The other way round than the official ones.
        listing.append(f"{name},{names[2 - number]} 1 2 3 4")
    (tmp_path / "labels.csv").write_text("\n".join(listing))
    labels = tmp_path / "labels.csv" if val == "listed" else None
    options = {"labels": labels, "official": False}
    prepare_folders("imagenet2012", root, tmp_path / "out", **options)
    found = names_of(tmp_path / "out", "validation", "imagenet2012")
    classes = names[:2][::-1] if val == "listed" else names[:2]
    assert [
        label.split(":")[0] for label in sorted(found, key=lambda n: n[-6])
    ] == classes
    info = read_info("imagenet2012", str(tmp_path / "out"))
    assert info.features["label"].num_classes == 1000
    with pytest.raises(DataError, match="expected 1,281,167 and 50,000"):
        prepare_folders("imagenet2012", root, tmp_path / "other")


def arrange(directory: Path, problem: str) -> None:
    if problem == "flat":
        directory.mkdir()
        (directory / "a.png").write_bytes(make_image(1))
    elif problem == "one class":
        make_folder(directory, ("a",), 2)
    elif problem == "unknown class":
        make_folder(directory / "train", ("a", "b"), 1)
        make_folder(directory / "val", ("a", "c"), 1)
    elif problem == "no labels":
        make_folder(directory / "train", ("a", "b"), 1)
        (directory / "val").mkdir()
        (directory / "val" / "x.png").touch()
    elif problem == "name":
        make_folder(directory, ("a", "b\n"), 1)
    elif problem == "no image":
        make_folder(directory / "train", ("a", "b"), 1)
        make_folder(directory / "val", ("a",), 1)
        (directory / "val" / "a" / "0.png").write_text("text")


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        ("missing", "is no folder"),
        ("flat", "has images of 0 classes"),
        ("one class", "has images of 1 classes"),
        ("unknown class", "classes that are not among the 2 to be learned, c first"),
        ("no labels", "is in no folder of a class"),
        ("name", "give its folder a plain name"),
        ("no image", "no image of validation can be read"),
    ],
)
def test_folders_that_are_no_set(tmp_path, problem, message):
    arrange(tmp_path / "in", problem)
    with pytest.raises(DataError, match=message) as caught:
        prepare_folders("own", tmp_path / "in", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "own" / "1.0.0").exists()


def test_a_class_may_be_called_train(tmp_path):
    make_folder(tmp_path, ("train", "car"), 20)
    assert find_images(tmp_path, 0.3, {}).classes == ("car", "train")


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    make_folder(tmp_path / "in", ("a", "b"), 12)
    prepare_folders(
        "own", tmp_path / "in", tmp_path / "out", held_out=0.4, dry_run=True
    )
    assert "a: " in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["a-b", "a/b", "a:1", "", "cluttered_mnist"])
def test_names_that_no_set_can_have(tmp_path, name):
    with pytest.raises(DataError, match="name"):
        prepare_folders(name, tmp_path, tmp_path / "out")


def test_training_and_evaluation_read_the_set(tmp_path):
    make_folder(tmp_path / "in", ("a", "b"), 64)
    prepare_folders("own", tmp_path / "in", tmp_path / "out", held_out=0.25)
    data_dir = str(tmp_path / "out")
    mnist = small_config(dataset="own", num_steps=10)
    mnist_training.run(mnist, tmp_path / "mnist", data_dir)
    rows = read_json(tmp_path / "mnist" / "summary.json")["networks"]
    assert rows.keys() == {"baseline", "batch_norm"}
    config = tiny_config(dataset="own", num_steps=4, workers=0)
    inception_training.run(config, tmp_path / "tiny", data_dir, network=TinyInception)
    runs = read_runs([tmp_path / "tiny"])
    data = trained_networks.open_data(runs, data_dir, load_splits)
    networks = trained_networks.load_networks(runs, "population", data, TinyInception)
    found = errors.evaluate(networks, data, [1], 0)
    assert found["test_set"]["examples"] == len(
        names_of(tmp_path / "out", "validation")
    )
