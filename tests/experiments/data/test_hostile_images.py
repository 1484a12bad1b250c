"""Images that somebody changed, or made to be dear: one crop, or one line, and soon."""

import io
import random
import struct
import subprocess
import sys
import zlib
from collections import Counter

import numpy as np
import PIL.Image

from experiments.data.crops import evaluation_crops, training_crop
from experiments.data.decoding import MAX_PIXELS, MAX_RATIO, decode, image_size
from experiments.data.splits import Augmentation, UndecodableError
from tests.experiments.helpers import REPOSITORY, command_environment

AUGMENTATION = Augmentation(image_size=16, min_area=0.08, flip=True, crop_fraction=0.9)
NUM_CHANGES = 3000
HEADER = 640  # bytes, of the files below; what follows are pixels
CROPS = 10


def encode(mode, form, **options):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 14, 4), dtype=np.uint8)
    image = PIL.Image.fromarray(pixels).resize((70, 60)).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def exif():
    """With an orientation and a thumbnail's tags."""
    tags = PIL.Image.Exif()
    tags[0x0112], tags[0x010E] = 6, "a description"
    return tags.tobytes()


IMAGES = {
    "baseline": encode("RGB", "jpeg"),
    "progressive": encode("RGB", "jpeg", progressive=True),
    "exif": encode("RGB", "jpeg", exif=exif()),
    "restarts": encode("RGB", "jpeg", restart_marker_blocks=1),
    "grey": encode("L", "jpeg"),
    "inks": encode("CMYK", "jpeg"),
    "png": encode("RGB", "png"),
    "palette": encode("P", "png"),
    "transparent": encode("RGBA", "png"),
}


def train(encoded):
    return training_crop(encoded, AUGMENTATION, np.random.default_rng(0))


def evaluate(encoded):
    image = decode(encoded)
    # A decoder that saw another size than was allowed could have seen any.
    assert image.shape[:2] == image_size(encoded)
    return evaluation_crops(image, AUGMENTATION, CROPS)


def outcome(read, encoded, shape):
    try:
        crops = read(encoded)
    except UndecodableError as error:
        message = str(error)
    else:
        assert crops.shape == shape
        return "decoded"
    assert message.isprintable()
    return "refused"


def with_checksums(png):
    """A PNG whose chunks have the checksums of what they hold now."""
    position = 8
    while position + 12 <= len(png):
        (length,) = struct.unpack_from(">I", png, position)
        end = position + 8 + length
        if end + 4 > len(png):
            break
        png[end : end + 4] = struct.pack(">I", zlib.crc32(png[position + 4 : end]))
        position = end + 4
    return png


def change(encoded, chance):
    """Changes the header: bits, numbers of two and four bytes, lengths, markers."""
    changed = bytearray(encoded)
    for _ in range(chance.randint(1, 3)):
        place = chance.randrange(3, min(HEADER, len(changed)))
        kind = chance.randrange(6)
        if kind == 0:
            changed[place] ^= 1 << chance.randrange(8)
        elif kind == 1:
            width = chance.choice([1, 2, 4])
            value = chance.choice([0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31])
            struct.pack_into(
                {1: "B", 2: ">H", 4: ">I"}[width],
                changed,
                place,
                value % 2 ** (8 * width),
            )
        elif kind == 2:
            del changed[place : place + chance.randrange(1, 40)]
        elif kind == 3:
            marker = bytes([0xFF, chance.choice([0x01, 0xC0, 0xC2, 0xD0, 0xD9, 0xDA])])
            changed[place:place] = marker + chance.randbytes(chance.randrange(20))
        elif kind == 4:
            end = place + chance.randrange(80)
            changed[place:place] = changed[place:end]
        else:
            changed[place:place] = b"\xff" * chance.randrange(300)
    is_png = encoded.startswith(b"\x89")
    return bytes(with_checksums(changed) if is_png else changed)


def test_any_change_of_a_header_is_taken_alike_in_training_and_evaluation(capfd):
    chance = random.Random(0)
    counts = Counter()
    for number in range(NUM_CHANGES):
        encoded = change(list(IMAGES.values())[number % len(IMAGES)], chance)
        trained = outcome(train, encoded, (16, 16, 3))
        evaluated = outcome(evaluate, encoded, (CROPS, 16, 16, 3))
        assert trained == evaluated
        counts[trained] += 1
    assert counts.total() == NUM_CHANGES
    assert min(counts.values()) > NUM_CHANGES / 10


def chunk(kind, data):
    checksum = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + checksum


NOTE = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(8 * 10**6)))


def png(width, height, *, extra=b"", colours=2, pixel_bytes=3):
    """A PNG of one colour, of any size."""
    rows = zlib.compressobj(9)
    row = bytes(1 + pixel_bytes * width)
    data = b"".join(rows.compress(row) for _ in range(height)) + rows.flush()
    size = struct.pack(">IIBBBBB", width, height, 8, colours, 0, 0, 0)
    pixels = chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + extra + pixels


def claiming(encoded, height, width):
    """A JPEG whose header says another size."""
    frame = max(encoded.find(b"\xff\xc0"), encoded.find(b"\xff\xc2")) + 5
    return encoded[:frame] + struct.pack(">HH", height, width) + encoded[frame + 4 :]


def hidden(encoded, height, width):
    """A JPEG of another size than who takes a lone marker for a segment's finds.

    The real frame stands where that segment's length is looked for, 0xFFC0, and the
    frame that is found then lies in the real one's pixels.
    """
    frame = encoded.index(b"\xff\xc0")
    real = claiming(encoded, height, width)[frame:-2]
    padding = bytes(0xFFC0 - len(real))
    return encoded[:frame] + b"\xff\x01" + real + padding + encoded[frame:]


HOSTILE = {
    "markers": b"\xff\xd8\xff" + b"\xff" * 2**22 + b"\x00",
    "segments of nothing": b"\xff\xd8\xff" + b"\xfe\x00\x00\xff" * 2**20,
    "starts of scans": b"\xff\xd8\xff" + b"\xda\xff" * 2**21,
    "long and thin": png(65_000, 1),
    "high and thin": png(1, 65_000),
    "65500 x 65500": claiming(IMAGES["baseline"], 65_500, 65_500),
    "32000 x 32000": claiming(IMAGES["baseline"], 32_000, 32_000),
    "progressive": claiming(IMAGES["progressive"], 32_000, 32_000),
    "just too many": claiming(IMAGES["baseline"], 1 + MAX_PIXELS // 8192, 8192),
    "just too thin": png(MAX_RATIO + 1, 1),
    "many scans": claiming(IMAGES["progressive"], 8000, 8000)[:-2]
    + b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00" * 2000
    + b"\xff\xd9",
    "many scans of a grey one": claiming(IMAGES["grey"], 8000, 8000).replace(
        b"\xff\xda\x00\x08\x01", b"\xff\xda\x00\x08\x02"
    )[:-2]
    + b"\xff\xda" * 2000
    + b"\xff\xd9",
    "a hidden frame": hidden(IMAGES["baseline"], 32_000, 32_000),
    "gigabytes of notes": png(64, 64, extra=300 * NOTE),
    "PNG of 2^31": png(2, 2).replace(b"\0\0\0\2" * 2, b"\x7f\xff\xff\xff" * 2, 1),
}

REFUSE = """
from pathlib import Path
from tests.experiments.data.test_hostile_images import HOSTILE, evaluate, outcome, train
for name, encoded in HOSTILE.items():
    assert outcome(train, encoded, None) == outcome(evaluate, encoded, None), name
    assert outcome(train, encoded, None) == "refused", name
# Not `ru_maxrss`, which a process has from the one that started it.
(peak,) = [
    line.split()[1]
    for line in Path("/proc/self/status").read_text().splitlines()
    if line.startswith("VmHWM")
]
print(int(peak) // 1024)
"""


def test_images_that_would_take_all_time_or_memory_are_refused_at_once():
    """In a process of its own, whose memory is measured."""
    done = subprocess.run(
        [sys.executable, "-c", REFUSE],
        cwd=REPOSITORY,
        env=command_environment(),
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert done.stderr == ""
    assert int(done.stdout) < 700  # MB, most of which are libraries


def test_the_limits_hold_for_what_is_within_them():
    within = [png(MAX_RATIO, 1), png(1, MAX_RATIO), png(1, 1), png(9, 9, extra=NOTE)]
    for encoded in within:
        assert outcome(train, encoded, (16, 16, 3)) == "decoded"
        assert outcome(evaluate, encoded, (CROPS, 16, 16, 3)) == "decoded"
