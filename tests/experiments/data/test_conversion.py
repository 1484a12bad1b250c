import numpy as np
import pytest

from experiments.data.conversion import convert
from experiments.data.errors import DataError
from experiments.data.prepared import load_prepared
from tests.experiments.data.prepared_sets import edit_json
from tests.experiments.helpers import read_files


def error_of(*arguments):
    with pytest.raises(DataError) as caught:
        convert(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def tfrecord_dir(tiny_dir):
    if not list(tiny_dir.rglob("*.tfrecord-*")):
        pytest.skip("this set is array_record")
    return tiny_dir


def test_a_converted_set_is_the_same(tfrecord_dir, tmp_path, capsys):
    before = read_files(tfrecord_dir)
    convert("tiny", str(tfrecord_dir), str(tmp_path / "new"))
    assert "tiny: 52 examples in 4 files, in" in capsys.readouterr().out
    found = load_prepared("tiny", str(tmp_path / "new"))
    expected = load_prepared("tiny", str(tfrecord_dir))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    assert read_files(tfrecord_dir) == before
    names = {path.name for path in (tmp_path / "new" / "tiny").iterdir()}
    assert names == {".lock", "1.0.0"}
    assert "is there already" in error_of(
        "tiny", str(tfrecord_dir), str(tmp_path / "new")
    )


def test_tfds_reads_a_converted_set(tfrecord_dir, tmp_path):
    import tensorflow_datasets as tfds

    convert("tiny", str(tfrecord_dir), str(tmp_path))
    builder = tfds.builder_from_directory(tmp_path / "tiny" / "1.0.0")
    source = builder.as_data_source("train")
    images = load_prepared("tiny", str(tmp_path)).train_images
    np.testing.assert_array_equal(source[5]["image"], images[5])


def test_a_set_in_the_other_form(tiny_dir, tmp_path):
    if list(tiny_dir.rglob("*.tfrecord-*")):
        pytest.skip("this set is TFRECORD")
    message = error_of("tiny", str(tiny_dir), str(tmp_path))
    assert "has the form array_record: expected tfrecord" in message


@pytest.mark.parametrize("damage", ["truncated", "missing", "short"])
def test_damage_leaves_nothing(tfrecord_dir, tmp_path, damage):
    import shutil

    source = shutil.copytree(tfrecord_dir, tmp_path / "source")
    path = sorted(source.rglob("tiny-train.tfrecord-*"))[1]
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-5])
    elif damage == "missing":
        path.unlink()
    else:
        other = sorted(source.rglob("tiny-test.tfrecord-*"))[0]
        path.write_bytes(other.read_bytes())
    message = error_of("tiny", str(source), str(tmp_path / "new"))
    assert path.name in message
    assert list(read_files(tmp_path / "new")) == ["tiny/.lock"]


def test_file_templates_are_renamed(tfrecord_dir, tmp_path):
    import json
    import shutil

    source = shutil.copytree(tfrecord_dir, tmp_path / "source")
    info = source / "tiny" / "1.0.0" / "dataset_info.json"
    splits = json.loads(info.read_text())["splits"]
    for split in splits:
        split["filepathTemplate"] = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    edit_json(info, splits=splits)
    convert("tiny", str(source), str(tmp_path / "new"))
    assert len(load_prepared("tiny", str(tmp_path / "new")).train_images) == 40
