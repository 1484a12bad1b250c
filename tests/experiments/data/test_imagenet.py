import fcntl
import shutil

import numpy as np
import pytest

from experiments.data import imagenet, imagenet_archives, imagenet_builder
from experiments.data.errors import DataError
from experiments.data.imagenet import prepare_imagenet
from experiments.data.prepared_splits import load_prepared_splits
from experiments.data.splits import Augmentation, UndecodableError
from tests.experiments.data.imagenet_shaped import (
    VERSION,
    make_archives,
    make_tar,
    train_images,
    validation_images,
)
from tests.experiments.helpers import read_files

NUM_TRAIN, NUM_VALIDATION = 30, 12
MADE = {
    "train": train_images(NUM_TRAIN, True, 0),
    "validation": validation_images(NUM_VALIDATION, True, 0),
}


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """The directory of the archives, not to be changed."""
    directory = tmp_path_factory.mktemp("archives")
    make_archives(directory, num_train=NUM_TRAIN, num_validation=NUM_VALIDATION)
    return directory


@pytest.fixture
def own_archives(archives, tmp_path):
    return shutil.copytree(archives, tmp_path / "archives")


@pytest.fixture
def data_dir(tmp_path):
    return tmp_path / "sets"


@pytest.fixture
def official_sizes(archives, monkeypatch):
    """As if these archives, of a few classes, were the official ones."""
    for name, images in zip(("TRAIN", "VALIDATION"), MADE.values(), strict=True):
        archive = getattr(imagenet_archives, name)
        size = (archives / archive.file_name).stat().st_size
        changed = archive._replace(num_bytes=size, num_images=len(images))
        for module in (imagenet_archives, imagenet_builder):
            monkeypatch.setattr(module, name, changed)
    monkeypatch.setattr(
        imagenet,
        "check_archives",
        lambda directory, classes, official: imagenet_archives.check_archives(
            directory, {image.label for image in MADE["train"]}, official=official
        ),
    )


def prepare_part(manual_dir, data_dir):
    prepare_imagenet(manual_dir, data_dir, official=False)


def error_of(manual_dir, data_dir, **options):
    with pytest.raises(DataError) as caught:
        prepare_imagenet(manual_dir, data_dir, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def read_by_tfds(data_dir, split):
    """What a user of TFDS, who knows nothing of this project, finds."""
    import tensorflow_datasets as tfds

    return list(
        tfds.data_source(
            "imagenet2012",
            split=split,
            data_dir=data_dir,
            download=False,
            decoders={"image": tfds.decode.SkipDecoding()},
        )
    )


def tfds_order(split):
    """The images in the order that TFDS gives examples with these keys."""
    from tensorflow_datasets.core.hashing import Hasher

    hasher = Hasher(split)
    return sorted(MADE[split], key=lambda image: hasher.hash_key(image.file_name))


@pytest.mark.parametrize("several_shards", [False, True])
def test_prepared_set_is_that_of_tfds(archives, data_dir, monkeypatch, several_shards):
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.utils import shard_utils

    if several_shards:
        monkeypatch.setattr(shard_utils.ShardConfig, "min_shard_size", 2000)
    prepare_part(archives, data_dir)
    builder = tfds.builder("imagenet2012", data_dir=data_dir)
    assert builder.is_prepared()
    assert str(builder.version) == VERSION
    names = builder.info.features["label"].names
    for split in MADE:
        assert (builder.info.splits[split].num_shards > 1) == several_shards
        found = read_by_tfds(data_dir, split)
        assert [
            (example["file_name"].decode(), names[example["label"]], example["image"])
            for example in found
        ] == [tuple(image) for image in tfds_order(split)]


def test_metadata_are_those_of_the_registered_builder(archives, data_dir):
    import tensorflow_datasets as tfds

    prepare_part(archives, data_dir)
    found = tfds.core.read_only_builder.builder_from_files(
        "imagenet2012", data_dir=data_dir
    ).info
    expected = tfds.builder("imagenet2012", data_dir=data_dir / "none").info
    assert repr(found.features) == repr(expected.features)
    assert found.features["label"].names == expected.features["label"].names
    for name in ("name", "version", "description", "citation", "supervised_keys"):
        assert getattr(found, name) == getattr(expected, name)
    assert found.file_format.value == "array_record"


def test_prepared_set_is_one_to_train_with(archives, data_dir):
    prepare_part(archives, data_dir)
    augmentation = Augmentation(16, 1, False, 0.875)
    splits = load_prepared_splits("imagenet2012", str(data_dir), augmentation)
    assert [len(split) for split in splits] == [NUM_TRAIN, NUM_VALIDATION]
    for split in splits:
        broken = 0
        for index in range(len(split)):
            try:
                split.training_example(index, np.random.default_rng(0))
            except UndecodableError:
                broken += 1
        assert broken == 1


def test_official_archives(archives, data_dir, official_sizes, capsys):
    prepare_imagenet(archives, data_dir)
    assert capsys.readouterr().out.splitlines() == [
        f"preparing imagenet2012 in {data_dir}/imagenet2012/{VERSION}",
        "train: 30 images, 1 files",
        "validation: 12 images, 1 files",
    ]


def test_archives_of_another_size_are_not_official(archives, data_dir):
    message = error_of(archives, data_dir)
    assert "ILSVRC2012_img_train.tar has" in message
    assert not data_dir.exists()


def test_too_few_images_in_an_official_archive(
    own_archives, data_dir, official_sizes, monkeypatch
):
    archive = imagenet_builder.VALIDATION
    path = own_archives / archive.file_name
    images = {image.file_name: image.content for image in MADE["validation"][:-1]}
    content = make_tar(images)
    path.write_bytes(content + bytes(archive.num_bytes - len(content)))
    message = error_of(own_archives, data_dir)
    assert message.startswith(f"archive {path} holds 11 images, not 12; download")
    assert list((data_dir / "imagenet2012").iterdir()) == [
        data_dir / "imagenet2012" / ".lock"
    ]


def test_prepared_twice(archives, data_dir, tmp_path, capsys):
    prepare_part(archives, data_dir)
    before = read_files(data_dir)
    capsys.readouterr()
    prepare_imagenet(tmp_path / "none", data_dir)
    assert "already prepared" in capsys.readouterr().out
    assert read_files(data_dir) == before


def test_the_same_archives_give_the_same_files(archives, data_dir, tmp_path):
    prepare_part(archives, data_dir)
    prepare_part(archives, tmp_path / "again")
    logs = ("dataset_info.json",)  # with the time
    assert read_files(data_dir, but=logs) == read_files(tmp_path / "again", but=logs)


def test_failure_leaves_nothing(own_archives, data_dir):
    path = own_archives / "ILSVRC2012_img_val.tar"
    content = path.read_bytes()
    path.write_bytes(content[: len(content.rstrip(b"\0")) - 700])
    assert str(path) in error_of(own_archives, data_dir, official=False)
    files = list(read_files(data_dir))
    assert files == ["imagenet2012/.lock"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left")])
def test_interruption_leaves_nothing(archives, data_dir, monkeypatch, error):
    def interrupt(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(imagenet_builder, "collect", interrupt)
        with pytest.raises(type(error) if isinstance(error, OSError) else error):
            prepare_part(archives, data_dir)
    assert list(read_files(data_dir)) == ["imagenet2012/.lock"]
    prepare_part(archives, data_dir)
    assert len(read_by_tfds(data_dir, "train")) == NUM_TRAIN


def test_what_a_killed_run_left_disturbs_nobody(
    archives, data_dir, tmp_path, monkeypatch
):
    prepare_part(archives, tmp_path / "expected")
    version = f"imagenet2012/{VERSION}"
    left = data_dir / "imagenet2012" / ".preparing" / "imagenet2012"
    shutil.copytree(tmp_path / "expected" / version, left / f"incomplete.AB1_{VERSION}")
    (left / f"incomplete.AB1_{VERSION}" / "unsorted-train").mkdir()
    augmentation = Augmentation(16, 1, False, 0.875)
    with pytest.raises(DataError, match="'imagenet2012' is not prepared"):
        load_prepared_splits("imagenet2012", str(data_dir), augmentation)
    usage = shutil.disk_usage

    def look(directory):
        assert not left.exists()  # before the space that it takes is missed
        return usage(directory)

    monkeypatch.setattr(shutil, "disk_usage", look)
    prepare_part(archives, data_dir)
    logs = ("dataset_info.json",)
    found = read_files(data_dir / version, but=logs)
    assert found == read_files(tmp_path / "expected" / version, but=logs)
    assert not left.parent.exists()


def test_another_process_at_work(archives, data_dir):
    directory = data_dir / "imagenet2012"
    work = directory / ".preparing" / "precious"
    work.mkdir(parents=True)
    with (directory / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        message = error_of(archives, data_dir, official=False)
    assert f"another process is preparing imagenet2012 in {directory}" in message
    assert work.exists()


def test_too_small_a_disk(archives, data_dir, monkeypatch):
    needed = 1.02 * sum(path.stat().st_size for path in archives.iterdir())
    usage = shutil.disk_usage(archives)
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _: usage._replace(free=int(needed) - 1)
    )
    message = error_of(archives, data_dir, official=False)
    assert (
        f"{int(needed) - 1:,} bytes free: expected at least {int(needed):,}" in message
    )
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _: usage._replace(free=int(needed))
    )
    prepare_part(archives, data_dir)


def test_directory_that_holds_something_else(archives, data_dir):
    version = data_dir / "imagenet2012" / VERSION
    version.mkdir(parents=True)
    (version / "notes.txt").write_text("kept")
    message = error_of(archives, data_dir, official=False)
    assert f"{version} is there but holds no prepared set" in message
    assert (version / "notes.txt").read_text() == "kept"


def test_file_that_belongs_to_no_class(own_archives, data_dir):
    path = own_archives / "ILSVRC2012_img_train.tar"
    path.write_bytes(make_tar({"n00000001.tar": make_tar({"a.JPEG": b"a"})}))
    message = error_of(own_archives, data_dir, official=False)
    assert "it holds n00000001.tar" in message


def test_archive_without_images(own_archives, data_dir):
    path = own_archives / "ILSVRC2012_img_val.tar"
    path.write_bytes(make_tar({}))
    message = error_of(own_archives, data_dir, official=False)
    assert f"archive {path} holds 0 images" in message
