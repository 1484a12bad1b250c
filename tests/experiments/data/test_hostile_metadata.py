"""Metadata that somebody changed: refused in one line, or the set is read as it is."""

import grp
import json
import os
import pwd
import random
import shutil
from collections import Counter

import numpy as np
import pytest

from experiments.data.errors import DataError
from experiments.data.prepared import load_prepared
from experiments.data.prepared_splits import load_prepared_splits
from experiments.data.splits import Augmentation, UndecodableError
from tests.experiments.data.prepared_sets import (
    encode_png,
    prepare_set,
    turn_into_tfrecord,
)

AUGMENTATION = Augmentation(image_size=6, min_area=1, flip=False, crop_fraction=1)
NUM_EXAMPLES = 8
FILES = ("features.json", "dataset_info.json")
NUM_CHANGES = 300  # of each file

# In the place of any value.
VALUES = (
    *(None, True, "", "x" * 10_000, [], {}, [[]], {"a": {}}, -1, 0, 1, 2**31, 2**62),
    *(2**64, 10**400, 0.5, float("nan"), float("inf"), "NaN", "-1", str(2**62)),
    *("../../elsewhere", "/dev/zero", "{SPLIT}.{SHARD_X_OF_Y}", "\x1b[31m\n", "\0"),
    *("os.path", "tensorflow_datasets.core.features.nosuch.Image"),
)


@pytest.fixture(scope="module")
def sound_set(tmp_path_factory):
    import tensorflow_datasets as tfds

    data_dir = tmp_path_factory.mktemp("sound")
    examples = [
        {"image": encode_png(np.full((6, 5, 3), 9 * number, np.uint8)), "label": number}
        for number in range(NUM_EXAMPLES)
    ]
    features = {
        "image": tfds.features.Image(shape=(6, 5, 3)),
        "label": tfds.features.ClassLabel(num_classes=NUM_EXAMPLES),
    }
    splits = {"train": examples, "test": examples}
    prepare_set(data_dir, splits, features, num_shards=2)
    return data_dir


@pytest.fixture
def changed_set(sound_set, tmp_path):
    shutil.copytree(sound_set, tmp_path, dirs_exist_ok=True)
    return tmp_path


def version_of(data_dir):
    return data_dir / "tiny" / "1.0.0"


def read_examples(data_dir):
    """All examples, by both readers: label and first pixel, in order."""
    found = []
    for split in load_prepared_splits("tiny", str(data_dir), AUGMENTATION):
        examples = [split.evaluation_example(i, 1) for i in range(len(split))]
        found.append([(e.label, int(e.images[0, 0, 0, 0])) for e in examples])
    images = load_prepared("tiny", str(data_dir))
    pixels = images.train_images[:, 0, 0, 0].tolist()
    found.append(list(zip(images.train_labels.tolist(), pixels, strict=True)))
    return found


def outcome(data_dir, sound):
    """How reading it ends, where nothing but these ways is right."""
    try:
        found = read_examples(data_dir)
    except (DataError, UndecodableError) as error:
        message = str(error)
    else:
        assert found == sound
        return "read"
    assert message.isprintable()
    assert len(message) < 2500
    return "refused"


def places(value, path=()):
    """The paths of all values in a JSON value."""
    yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    if isinstance(value, dict | list):
        for key, entry in entries:
            yield from places(entry, (*path, key))


def change_value(content, chance):
    """Puts another value, or key, in a random place of a JSON value."""
    *parents, last = chance.choice(list(places(content))[1:])
    place = content
    for key in parents:
        place = place[key]
    if isinstance(place, dict) and chance.random() < 0.2:
        place[chance.choice(["type", "json", last.upper(), "x"])] = place.pop(last)
    else:
        place[last] = chance.choice(VALUES)


def change_text(text, chance):
    """Flips bits of a file, cuts it, repeats a part of it, or nests it deeply."""
    start, end = sorted(chance.sample(range(len(text)), 2))
    kind = chance.randrange(4)
    if kind == 0:
        changed = bytearray(text)
        changed[start] ^= 1 << chance.randrange(8)
        return bytes(changed)
    if kind == 1:
        return text[:start]
    if kind == 2:
        return text[:end] + text[start:]
    depth = 10 ** chance.randrange(2, 6)
    return text[:start] + b"[" * depth + b"]" * depth + text[start:]


@pytest.mark.parametrize("file", FILES)
def test_any_change(changed_set, file):
    chance = random.Random(0)
    sound = read_examples(changed_set)
    path = version_of(changed_set) / file
    text = path.read_bytes()
    counts = Counter()
    for number in range(NUM_CHANGES):
        if number % 3:
            content = json.loads(text)
            change_value(content, chance)
            path.write_text(json.dumps(content))
        else:
            path.write_bytes(change_text(text, chance))
        counts[outcome(changed_set, sound)] += 1
    assert counts.total() == NUM_CHANGES
    assert counts["refused"] > NUM_CHANGES / 4
    path.write_bytes(text)
    assert outcome(changed_set, sound) == "read"


def image_of(content):
    """The description of the image in a features.json."""
    return content["featuresDict"]["features"]["image"]


def legacy(class_name):
    """A feature as earlier versions of TFDS wrote it."""
    return {"type": class_name, "content": {"shape": [6, 5, 3]}}


@pytest.mark.parametrize(
    "put",
    [
        lambda content, name: content.update(pythonClassName=name),
        lambda content, name: content.update(python_class_name=name),
        lambda content, name: content.update(legacy(name)),
        lambda content, name: image_of(content).update(pythonClassName=name),
        lambda content, name: content["featuresDict"]["features"].update(
            image={
                "pythonClassName": (
                    "tensorflow_datasets.core.features.features_dict.FeaturesDict"
                ),
                "jsonFeature": {"json": json.dumps({"x": legacy(name)})},
            }
        ),
    ],
    ids=["whole", "other spelling", "legacy", "image", "JSON as text"],
)
def test_code_of_others_is_not_run(changed_set, put, monkeypatch):
    (changed_set / "foreign.py").write_text("open('was_run', 'w')")
    monkeypatch.chdir(changed_set)
    monkeypatch.syspath_prepend(changed_set)
    path = version_of(changed_set) / "features.json"
    content = json.loads(path.read_text())
    put(content, "foreign.Image")
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"names 'foreign.Image', no feature of TFDS"):
        read_examples(changed_set)
    assert not (changed_set / "was_run").exists()


@pytest.mark.parametrize(
    "file", [*FILES, "label.labels.txt", "../.config/metadata.json"]
)
@pytest.mark.parametrize("kind", ["pipe", "device", "huge"])
def test_what_is_no_file_or_too_large_is_not_opened(changed_set, file, kind):
    path = version_of(changed_set) / file
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with path.open("wb") as made:
            made.truncate(2**40)
    with pytest.raises(
        DataError, match=r"cannot be read .*(no plain file|has 1,099,5)"
    ):
        read_examples(changed_set)


def test_records_that_are_no_files(changed_set):
    path = next(version_of(changed_set).glob("*.array_record-*"))
    path.unlink()
    os.mkfifo(path)
    for read in (load_prepared, load_splits):
        with pytest.raises(DataError, match="is no plain file"):
            read("tiny", str(changed_set))


def load_splits(name, data_dir):
    return load_prepared_splits(name, data_dir, AUGMENTATION)


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_files_of_an_owner_without_a_name(changed_set, file_format, monkeypatch):
    """As in containers, and on disks of other machines."""
    if file_format == "tfrecord":
        turn_into_tfrecord(version_of(changed_set))
    sound = read_examples(changed_set)

    def unknown(number):
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(grp, "getgrgid", unknown)
    assert read_examples(changed_set) == sound


def test_images_of_another_shape_than_said(changed_set):
    """On devices all lie in one array."""
    path = version_of(changed_set) / "features.json"
    content = json.loads(path.read_text())
    image_of(content)["image"]["shape"]["dimensions"] = ["6", "4", "3"]
    path.write_text(json.dumps(content))
    train, _ = load_splits("tiny", str(changed_set))
    with pytest.raises(DataError, match="cannot be decoded"):
        train.device_examples(lambda message: None)
    with pytest.raises(UndecodableError, match="6x5 pixels, expected 6x4 as its feat"):
        train._whole(0)
