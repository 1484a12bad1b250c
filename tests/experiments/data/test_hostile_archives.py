"""ImageNet's archives with what no archive of images should hold: one line each."""

import io
import os
import random
import tarfile
from collections import Counter

import pytest

from experiments.data import imagenet_builder
from experiments.data.errors import DataError
from experiments.data.imagenet import prepare_imagenet
from experiments.data.imagenet_archives import TRAIN, read_train
from experiments.data.shuffling import collect, distribute
from experiments.data.tfrecord import frame
from tests.experiments.data.imagenet_shaped import make_archives, make_tar

CLASSES = ("n01440764", "n01443537")
IMAGE = b"an image" * 90
NUM_CHANGES = 3000


def member(name, kind=tarfile.REGTYPE, size=0, link="", headers=None):
    """A header, which may claim what it likes, and no content."""
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, link
    info.pax_headers = headers or {}
    pax = tarfile.PAX_FORMAT if headers else tarfile.GNU_FORMAT
    return info.tobuf(pax, errors="surrogateescape")


def archive(inner):
    """A training archive of one class."""
    return make_tar({f"{CLASSES[0]}.tar": inner})


IMAGES = make_tar({"n01440764_1.JPEG": IMAGE}).rstrip(b"\0")
IMAGES += bytes(-len(IMAGES) % tarfile.BLOCKSIZE)
END = bytes(2 * tarfile.BLOCKSIZE)
SPARSE = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "x"}

MEMBERS = {
    "dangling symbolic link": member("a.JPEG", tarfile.SYMTYPE, link="nowhere"),
    "symbolic link to a sound one": member(
        "a.JPEG", tarfile.SYMTYPE, link="n01440764_1.JPEG"
    ),
    "dangling hard link": member("a.JPEG", tarfile.LNKTYPE, link="nowhere"),
    "loop of links": member("a", tarfile.SYMTYPE, link="b")
    + member("b", tarfile.SYMTYPE, link="a"),
    "link to itself": member("a", tarfile.LNKTYPE, link="a"),
    "link outside": member("a", tarfile.SYMTYPE, link="/etc/passwd"),
    "character device": member("a", tarfile.CHRTYPE),
    "block device": member("a", tarfile.BLKTYPE),
    "pipe": member("a", tarfile.FIFOTYPE),
    "sparse": member("a", tarfile.GNUTYPE_SPARSE, size=2**62),
    "sparse in pax headers": member("a", headers=SPARSE | {"GNU.sparse.realsize": "9"}),
    "2^62 bytes": member("a.JPEG", size=2**62),
    "2^62 bytes in pax headers": member("a.JPEG", headers={"size": str(2**62)}),
    "negative size": member("a.JPEG", size=-(2**40)),
    "negative size in pax headers": member("a.JPEG", headers={"size": "-1024"}),
    "name of 2^62 bytes": member("a", tarfile.GNUTYPE_LONGNAME, size=2**62),
    "link of a negative size": member("a", tarfile.GNUTYPE_LONGLINK, size=-(2**20)),
    "pax headers of 2^62 bytes": member("a", tarfile.XHDTYPE, size=2**62),
    "pax headers of 2^40 bytes": member("a", tarfile.XGLTYPE, size=2**40),
    "name that is not UTF-8": member("\udcff\udcfe.JPEG"),
    "name of control characters": member("\x1b[31m\n.JPEG"),
    "chain of pax headers": member("a", tarfile.XHDTYPE) * 3000,
    "chain of long names": member("a", tarfile.GNUTYPE_LONGNAME) * 3000,
    "unknown kind": member("a", b"Z", size=2**62),
}


def error_of(read, *arguments, **options):
    with pytest.raises(DataError) as caught:
        read(*arguments, **options)
    message = str(caught.value)
    assert message.isprintable()
    return message


def read(path):
    with path.open("rb") as file:
        return list(read_train(path, file, CLASSES))


@pytest.fixture
def path(tmp_path):
    return tmp_path / TRAIN.file_name


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("place", ["inside", "outside"])
def test_members_that_are_no_plain_files(path, name, place):
    inner = IMAGES + MEMBERS[name] + END
    outer = IMAGES.replace(b"n01440764_1.JPEG", b"n01440764.tar\0\0\0")
    path.write_bytes(archive(inner) if place == "inside" else MEMBERS[name] + outer)
    message = error_of(read, path)
    assert f"archive {path} is damaged, or not ImageNet's: " in message


def test_a_member_too_large_for_an_image(path):
    with path.open("wb") as file:
        size = 2**26 + 1
        inner = member("a.JPEG", size=size)
        outer = member("n01440764.tar", size=len(inner) + size)
        file.write(outer + inner)
        file.truncate(len(outer) + len(inner) + size + 2**20)
    assert "claims 67,108,865 bytes" in error_of(read, path)


def test_names_with_directories_lead_nowhere(path):
    """Nothing is unpacked: of a name only the last part is taken."""
    inner = make_tar({"../../up.JPEG": IMAGE, "/etc/passwd": IMAGE})
    path.write_bytes(make_tar({"../n01440764.tar": inner}))
    assert [image.file_name for image in read(path)] == ["up.JPEG", "passwd"]


FIELDS = {  # of a header: where it is, and how long
    "name": (0, 100),
    "mode": (100, 8),
    "size": (124, 12),
    "kind": (156, 1),
    "link": (157, 100),
    "magic": (257, 8),
    "device": (329, 16),
    "prefix": (345, 155),
    "sparse": (386, 126),
}
CONTENTS = (
    b"\x80" + b"\x00" * 3 + b"\x3f" + b"\xff" * 7,
    *(b"\xff" * 12, b"\xff" * 10 + b"\x00" * 2, b"\x80" + b"\xff" * 11),
    *(b"-0000000001\0", b"77777777777\0", b"00000001000\0", b"\0" * 12, b"x" * 12),
    *(b"\xff\xfe\0", b"../../x\0", b"/etc/passwd\0", b"\x1b[31m\0"),
)
KINDS = b"0123456789ABCDgKLMNSVxX\0\xff"


def change_header(content, header, chance):
    """Puts something else in a field, with the header's checksum as it should be."""
    start, length = chance.choice(list(FIELDS.values()))
    start += header
    value = chance.choice([*CONTENTS, chance.randbytes(length)])
    if length == 1:
        value = bytes([chance.choice(KINDS)])
    content[start : start + length] = value[:length].ljust(length, b"\0")
    checksum = slice(header + 148, header + 156)
    content[checksum] = b" " * 8
    content[checksum] = b"%06o\0 " % sum(content[header : header + 512])


def change_pax(content, chance):
    """Puts another value in a record of a pax header."""
    start = content.index(b"comment=") + len(b"comment=")
    key = chance.choice(
        [b"size=", b"path=", b"GNU.sparse.size=", b"GNU.sparse.map=", b"mtime="]
    )
    value = chance.choice([b"-1", b"9" * 30, b"1,2", b"nan", b"\xff", b"0,9,9", b"a/b"])
    content[start - 8 : start + 40] = (key + value).ljust(48, b"0")


def bases():
    """Archives in the forms that tar has, with long names in pax headers and GNU's."""
    many = {f"{c}_{i}.JPEG": IMAGE for c in CLASSES for i in range(2)}
    yield make_tar({f"{c}.tar": make_tar(many) for c in CLASSES})
    inner = make_tar({"a" * 150 + ".JPEG": IMAGE})
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
            info = tarfile.TarInfo("d" * 120 + "/n01440764.tar")
            info.size, info.pax_headers = len(inner), {"comment": "x" * 40}
            tar.addfile(info, io.BytesIO(inner))
        yield buffer.getvalue()


def test_any_change_of_headers(path):
    """Read, perhaps as another one, or refused in one line; nothing else."""
    chance = random.Random(0)
    originals = list(bases())
    counts = Counter()
    for _ in range(NUM_CHANGES):
        content = bytearray(chance.choice(originals))
        headers = [
            start
            for start in range(0, len(content) - 512, 512)
            if content[start + 257 : start + 262] == b"ustar"
        ]
        for _ in range(chance.randint(1, 2)):
            change_header(content, chance.choice(headers), chance)
        if b"comment=" in content and chance.random() < 0.5:
            change_pax(content, chance)
        path.write_bytes(content)
        try:
            images = read(path)
        except DataError as error:
            refused = str(error)
        else:
            # What a header says of a name or a size may be believed; no more is read.
            assert all(len(image.content) < len(content) for image in images)
            counts["read"] += 1
            continue
        assert refused.isprintable()
        counts["refused"] += 1
    assert counts.total() == NUM_CHANGES
    assert min(counts.values()) > NUM_CHANGES / 10


@pytest.fixture
def archives(tmp_path):
    make_archives(tmp_path / "archives", num_train=9, num_validation=5, broken=False)
    return tmp_path / "archives"


@pytest.mark.parametrize("name", ["loop of links", "sparse", "name that is not UTF-8"])
def test_preparing_ends_with_nothing_half_written(archives, tmp_path, name):
    (archives / TRAIN.file_name).write_bytes(archive(IMAGES + MEMBERS[name] + END))
    data_dir = tmp_path / "sets"
    error_of(prepare_imagenet, archives, data_dir, official=False)
    assert os.listdir(data_dir / "imagenet2012") == [".lock"]


@pytest.mark.parametrize("added", ["record", "pickle", "copy"])
def test_what_somebody_adds_to_the_temporary_files(
    archives, tmp_path, monkeypatch, added
):
    """It is no code, and no example."""
    ran = tmp_path / "ran"
    pickled = b"cposix\nsystem\n(S'touch " + bytes(ran) + b"'\ntR."

    def collect_more(directory, num_records):
        assert directory.stat().st_mode & 0o077 == 0  # others could not add
        path = sorted(directory.iterdir())[0]
        sound = path.read_bytes()
        record = {"record": b"", "pickle": pickled, "copy": b""}[added]
        more = sound if added == "copy" else frame(bytes(16) + record)
        path.write_bytes(more + sound)
        yield from collect(directory, num_records)

    monkeypatch.setattr(imagenet_builder, "collect", collect_more)
    error_of(prepare_imagenet, archives, tmp_path / "sets", official=False)
    assert not ran.exists()
    assert os.listdir(tmp_path / "sets" / "imagenet2012") == [".lock"]


def test_two_records_of_one_key(tmp_path):
    distribute([(bytes(16), b"a"), (bytes(16), b"b")], tmp_path)
    with pytest.raises(DataError, match="the same key"):
        list(collect(tmp_path, 2))
