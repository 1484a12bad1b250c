import pytest

from experiments.data import imagenet_archives
from experiments.data.errors import DataError
from experiments.data.imagenet_archives import (
    TRAIN,
    VALIDATION,
    ArchivedImage,
    check_archives,
    read_train,
    read_validation,
)
from tests.experiments.data.imagenet_shaped import make_tar

CLASSES = ("n01440764", "n01443537")
LABELS = ("n01443537", "n01440764", "n01440764")
TRAIN_FILES = {
    "n01443537.tar": {"n01443537_7.JPEG": b"a" * 700, "n01443537_2.JPEG": b"b"},
    "n01440764.tar": {"n01440764_9.JPEG": b"c" * 2000},
}
VALIDATION_FILES = {
    "ILSVRC2012_val_00000003.JPEG": b"d" * 600,
    "ILSVRC2012_val_00000001.JPEG": b"",
}


@pytest.fixture
def train(tmp_path):
    path = tmp_path / TRAIN.file_name
    path.write_bytes(make_tar({n: make_tar(f) for n, f in TRAIN_FILES.items()}))
    return path


@pytest.fixture
def validation(tmp_path):
    path = tmp_path / VALIDATION.file_name
    path.write_bytes(make_tar(VALIDATION_FILES))
    return path


@pytest.fixture
def official_sizes(train, validation, monkeypatch):
    """As if these were the official archives."""
    for name, path in (("TRAIN", train), ("VALIDATION", validation)):
        archive = getattr(imagenet_archives, name)
        changed = archive._replace(num_bytes=path.stat().st_size)
        monkeypatch.setattr(imagenet_archives, name, changed)


def read(function, path, known):
    with path.open("rb") as file:
        return list(function(path, file, known))


def error_of(call, *arguments, **options):
    with pytest.raises(DataError) as caught:
        call(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert "; download" in message
    return message


def test_training_images_with_the_classes_of_their_archives(train):
    assert read(read_train, train, CLASSES) == [
        ArchivedImage("n01443537_7.JPEG", "n01443537", b"a" * 700),
        ArchivedImage("n01443537_2.JPEG", "n01443537", b"b"),
        ArchivedImage("n01440764_9.JPEG", "n01440764", b"c" * 2000),
    ]


def test_validation_images_with_the_labels_of_their_numbers(validation):
    assert read(read_validation, validation, LABELS) == [
        ArchivedImage("ILSVRC2012_val_00000003.JPEG", "n01440764", b"d" * 600),
        ArchivedImage("ILSVRC2012_val_00000001.JPEG", "n01443537", b""),
    ]


def test_labels_of_tfds_are_those_of_imagenet():
    """The classes of the first validation images, as the official kit lists them."""
    import tensorflow_datasets as tfds

    path = tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt")
    # sea snake, alp, Shetland sheepdog, soup bowl, cradle
    assert path.read_text().split()[:5] == [
        *("n01751748", "n09193705", "n02105855", "n04263257", "n03125729")
    ]


def test_directories_in_the_names_do_not_matter(tmp_path):
    path = tmp_path / "some.tar"
    images = {f"./train/{name}": image for name, image in VALIDATION_FILES.items()}
    path.write_bytes(make_tar(images))
    found = read(read_validation, path, LABELS)
    assert [image.file_name for image in found] == list(VALIDATION_FILES)


def test_whole_archives_pass(tmp_path, train, validation, official_sizes, capsys):
    for official in (True, False):
        check_archives(tmp_path, CLASSES, official=official)
    assert capsys.readouterr().out == ""


def test_official_sizes_and_numbers():
    """Those that the site and TFDS's catalogue give."""
    assert (TRAIN.num_bytes, TRAIN.num_images) == (147897477120, 1281167)
    assert (VALIDATION.num_bytes, VALIDATION.num_images) == (6744924160, 50000)


def test_missing_archive_shows_what_is_expected_and_found(
    tmp_path, train, validation, capsys
):
    validation.rename(tmp_path / "val.tar")
    (tmp_path / "more").mkdir()
    message = error_of(check_archives, tmp_path, CLASSES, official=False)
    assert message.startswith(f"{validation} is missing; download")
    assert capsys.readouterr().out.splitlines() == [
        "expected:",
        f"{tmp_path}/",
        "├── ILSVRC2012_img_train.tar  147,897,477,120 bytes",
        "└── ILSVRC2012_img_val.tar  6,744,924,160 bytes",
        "found:",
        f"{tmp_path}/",
        f"├── ILSVRC2012_img_train.tar  {train.stat().st_size:,} bytes",
        "├── more",
        f"└── val.tar  {(tmp_path / 'val.tar').stat().st_size:,} bytes",
    ]


def test_no_such_directory(tmp_path, capsys):
    message = error_of(check_archives, tmp_path / "none", CLASSES, official=True)
    assert f"{tmp_path / 'none' / TRAIN.file_name} is missing" in message
    assert f"{tmp_path / 'none' / VALIDATION.file_name} is missing" in message
    assert capsys.readouterr().out.endswith("└── nothing\n")


def test_crowded_directory_is_not_listed_whole(tmp_path, train, capsys):
    for number in range(30):
        (tmp_path / f"file{number}").touch()
    error_of(check_archives, tmp_path, CLASSES, official=True)
    assert "└── ... and 11 more\n" in capsys.readouterr().out


def test_unofficial_sizes(tmp_path, train, validation, official_sizes, capsys):
    size = train.stat().st_size
    train.write_bytes(train.read_bytes() + b"\0")
    message = error_of(check_archives, tmp_path, CLASSES, official=True)
    assert message.startswith(f"{train} has {size + 1:,} bytes, not {size:,}; download")
    assert "expected:" in capsys.readouterr().out
    check_archives(tmp_path, CLASSES, official=False)


def test_missing_class(tmp_path, train, validation, official_sizes):
    classes = (*CLASSES, "n01484850")
    message = error_of(check_archives, tmp_path, classes, official=True)
    assert f"{train} is damaged" in message
    assert "lacks 1 of 3 classes, n01484850 first" in message
    check_archives(tmp_path, classes, official=False)


@pytest.mark.parametrize("content", [b"", b"no tar at all" * 100])
@pytest.mark.parametrize("name", [TRAIN.file_name, VALIDATION.file_name])
def test_no_tar(tmp_path, train, validation, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    message = error_of(check_archives, tmp_path, CLASSES, official=False)
    assert f"archive {path} is damaged, or not ImageNet's" in message


@pytest.mark.parametrize("name", [TRAIN.file_name, VALIDATION.file_name])
def test_tar_of_something_else(tmp_path, train, validation, name):
    path = tmp_path / name
    path.write_bytes(make_tar({"holiday.png": b""}))
    message = error_of(check_archives, tmp_path, CLASSES, official=False)
    assert f"{path} is damaged, or not ImageNet's: it holds holiday.png" in message


@pytest.mark.parametrize("number", [0, 4])
def test_validation_image_without_a_label(tmp_path, number):
    path = tmp_path / VALIDATION.file_name
    path.write_bytes(make_tar({f"ILSVRC2012_val_0000000{number}.JPEG": b""}))
    message = error_of(read, read_validation, path, LABELS)
    assert f"ILSVRC2012_val_0000000{number}.JPEG has no known label" in message


def test_damage_is_noticed_while_reading(train, validation):
    """Truncation within a file, and a bit of any header, of either archive."""
    for path, function, known in (
        (train, read_train, CLASSES),
        (validation, read_validation, LABELS),
    ):
        whole = path.read_bytes()
        content_end = len(whole.rstrip(b"\0"))
        for size in range(100, content_end, 512):
            path.write_bytes(whole[:size])
            assert str(path) in error_of(read, function, path, known)
        names = [name.encode() for name in (*TRAIN_FILES, *VALIDATION_FILES)]
        names += [name.encode() for files in TRAIN_FILES.values() for name in files]
        headers = [whole.index(name) for name in names if name in whole]
        assert len(headers) >= 2
        for header in headers:
            damaged = bytearray(whole)
            damaged[header + 130] ^= 1  # of the size of the file
            path.write_bytes(damaged)
            assert str(path) in error_of(read, function, path, known)
