import io

import numpy as np
import PIL.Image
import pytest

from experiments.data.decoding import decode, image_size
from experiments.data.splits import UndecodableError

BICUBIC = PIL.Image.Resampling.BICUBIC


def make_image(height: int, width: int, channels: int = 3) -> np.ndarray:
    """Smooth random colours, of which JPEG changes little."""
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (5, 6, channels), dtype=np.uint8)
    layers = [
        np.asarray(PIL.Image.fromarray(layer).resize((width, height), BICUBIC))
        for layer in np.moveaxis(coarse, -1, 0)
    ]
    return np.stack(layers, axis=-1)


def encode(image: PIL.Image.Image | np.ndarray, form: str, **options) -> bytes:
    if isinstance(image, np.ndarray):
        image = PIL.Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def decode_with_pillow(encoded: bytes) -> np.ndarray:
    with PIL.Image.open(io.BytesIO(encoded)) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def solid(mode: str, colour: tuple[int, ...]) -> PIL.Image.Image:
    return PIL.Image.new(mode, (32, 16), colour)


RGB = make_image(60, 90)
CMYK = PIL.Image.frombytes("CMYK", (90, 60), make_image(60, 90, 4).tobytes())
BASELINE = encode(RGB, "jpeg", quality=95)
PROGRESSIVE = encode(RGB, "jpeg", quality=95, progressive=True)
PNG = encode(RGB, "png")


def with_segment(encoded: bytes, content: bytes) -> bytes:
    """A JPEG with one more segment, APP1, at its beginning."""
    length = (len(content) + 2).to_bytes(2)
    return encoded[:2] + b"\xff\xe1" + length + content + encoded[2:]


WITH_THUMBNAIL = with_segment(BASELINE, encode(make_image(12, 16), "jpeg"))


@pytest.mark.parametrize(
    "encoded",
    [
        BASELINE,
        PROGRESSIVE,
        encode(RGB, "jpeg", quality=95, subsampling=0),
        encode(RGB[..., 0], "jpeg"),
        encode(RGB[..., 0], "jpeg", progressive=True),
        WITH_THUMBNAIL,
    ],
    ids=["baseline", "progressive", "4:4:4", "grey", "grey progressive", "thumbnail"],
)
def test_jpeg_is_decoded_as_by_pillow(encoded):
    image = decode(encoded)
    assert image.dtype == np.uint8
    assert image.shape == (60, 90, 3)
    # Builds of libjpeg may differ in the last bit.
    np.testing.assert_allclose(image, decode_with_pillow(encoded), atol=1)


def test_channels_are_red_green_blue():
    for form in ("jpeg", "png"):
        image = decode(encode(solid("RGB", (250, 130, 10)), form))
        np.testing.assert_allclose(image, np.full((16, 32, 3), (250, 130, 10)), atol=2)


def ycck(encoded: bytes) -> bytes:
    """The same CMYK file, said to hold luma and chroma of its inks, as Photoshop's."""
    flags = encoded.index(b"Adobe") + len(b"Adobe") + 6
    assert encoded[flags] == 0
    return encoded[:flags] + b"\x02" + encoded[flags + 1 :]


@pytest.mark.parametrize("change", [bytes, ycck], ids=["CMYK", "YCCK"])
def test_cmyk_is_decoded_as_by_pillow(change):
    encoded = change(encode(CMYK, "jpeg", quality=95))
    # Both compute (255 - ink) * (255 - black) / 255. Pillow rounds; OpenCV divides by
    # 256 and rounds down: by less than 1 + 1 + 1/2 apart, so by 2 in integers.
    np.testing.assert_allclose(decode(encoded), decode_with_pillow(encoded), atol=2)


def test_cmyk_inks_have_their_colours():
    inks = {
        (255, 0, 0, 0): (0, 255, 255),
        (0, 255, 255, 0): (255, 0, 0),
        (0, 0, 0, 255): (0, 0, 0),
        (0, 0, 0, 0): (255, 255, 255),
    }
    for ink, colour in inks.items():
        image = decode(encode(solid("CMYK", ink), "jpeg"))
        np.testing.assert_allclose(image, np.full((16, 32, 3), colour), atol=3)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "1"])
def test_png_is_decoded_exactly(mode):
    colours = PIL.Image.fromarray(RGB)
    if mode in ("RGBA", "LA"):
        colours.putalpha(PIL.Image.fromarray(RGB[..., 1]))
    image = colours.convert(mode)
    expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(decode(encode(image, "png")), expected)


def test_orientation_is_ignored():
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    turned = encode(RGB, "jpeg", quality=95, exif=exif)
    assert image_size(turned) == (60, 90)
    np.testing.assert_array_equal(decode(turned), decode(BASELINE))


@pytest.mark.parametrize(
    ("at_least", "expected"),
    [
        (None, (120, 200)),
        (121, (120, 200)),
        (61, (120, 200)),
        (60, (60, 100)),
        (31, (60, 100)),
        (30, (30, 50)),
        (15, (15, 25)),
        (1, (15, 25)),
    ],
)
def test_reduces_while_the_shorter_side_is_long_enough(at_least, expected):
    image = make_image(120, 200)
    for pixels, shape in ((image, expected), (image.swapaxes(0, 1), expected[::-1])):
        assert decode(encode(pixels, "jpeg"), at_least).shape == (*shape, 3)


def test_a_reduced_image_is_an_average():
    image = make_image(120, 200)
    reduced = decode(encode(image, "jpeg", quality=95), 60)
    average = image.reshape(60, 2, 100, 2, 3).mean((1, 3))
    assert np.abs(reduced - average).mean() < 1.5


def test_a_png_is_not_reduced():
    np.testing.assert_array_equal(decode(PNG, 1), RGB)


@pytest.mark.parametrize(
    "encoded", [BASELINE, PROGRESSIVE, PNG, WITH_THUMBNAIL, encode(CMYK, "jpeg")]
)
def test_reads_the_size(encoded):
    assert image_size(encoded) == (60, 90)


@pytest.mark.parametrize("encoded", [BASELINE, PROGRESSIVE, PNG, WITH_THUMBNAIL])
def test_truncated_anywhere(encoded, capfd):
    in_the_header, later = range(700), range(700, len(encoded), 37)
    for length in (*in_the_header, *later, len(encoded) - 1):
        for part in (encoded[:length], encoded[:length] + bytes(len(encoded) - length)):
            for read in (decode, image_size):
                with pytest.raises(UndecodableError):
                    read(part)
    # Neither library has a say on such files.
    assert capfd.readouterr() == ("", "")


def test_says_that_a_file_is_truncated():
    with pytest.raises(UndecodableError, match="truncated: the JPEG's end-of-image"):
        decode(BASELINE[:-2])
    with pytest.raises(UndecodableError, match="truncated: the JPEG's header"):
        decode(BASELINE[:100])
    with pytest.raises(UndecodableError, match="truncated: the PNG's end"):
        decode(PNG[:-1])


@pytest.mark.parametrize("garbage", [b"\0" * 9, b"\xff\xda\xff", BASELINE[: 2 * 400]])
def test_what_follows_the_end_is_ignored(garbage):
    np.testing.assert_array_equal(decode(BASELINE + garbage), decode(BASELINE))
    np.testing.assert_array_equal(decode(PNG + garbage), RGB)


@pytest.mark.parametrize("stray", [b"\0\0\0", b"\xff\xff"], ids=["zeros", "fill"])
def test_stray_bytes_between_segments_are_skipped(stray):
    table = BASELINE.index(b"\xff\xdb")
    spaced = BASELINE[:table] + stray + BASELINE[table:]
    assert image_size(spaced) == (60, 90)
    np.testing.assert_array_equal(decode(spaced), decode(BASELINE))


def resized(encoded: bytes, height: int, width: int) -> bytes:
    """A JPEG whose header says another size."""
    progressive = b"\xff\xc2" in encoded
    frame = encoded.index(b"\xff\xc2" if progressive else b"\xff\xc0") + 5
    size = height.to_bytes(2) + width.to_bytes(2)
    return encoded[:frame] + size + encoded[frame + 4 :]


def with_scans(encoded: bytes, number: int) -> bytes:
    """A JPEG with so many scans, of which the last ones are empty."""
    missing = number - encoded.count(b"\xff\xda")
    return encoded[:-2] + b"\xff\xda" * missing + encoded[-2:]


@pytest.mark.parametrize(
    ("encoded", "reason"),
    [
        (b"", "neither a JPEG nor a PNG: 0 bytes"),
        (b"<html>404</html>", "neither a JPEG nor a PNG: 16 bytes that begin with"),
        (encode(RGB, "bmp"), "neither a JPEG nor a PNG"),
        (resized(BASELINE, 0, 90), "0x90 pixels"),
        (resized(BASELINE, 8193, 8192), "8193x8192 pixels: expected at most 67,108,8"),
        (resized(BASELINE, 65500, 65500), "65500x65500 pixels: expected at most"),
        (with_scans(resized(PROGRESSIVE, 8000, 8000), 17), "in all of its 17 scans"),
        (resized(BASELINE, 1, 101), "at most 100 times the shorter"),
        (resized(BASELINE, 909, 9), "at most 100 times the shorter"),
        (PNG[:60] + bytes(40) + PNG[100:], "content is malformed"),
        (BASELINE.replace(b"\xff\xdb", b"\xff\xfe"), "content is malformed"),
    ],
    ids=[
        *("empty", "text", "bmp", "no height", "too many pixels", "huge", "scans"),
        *("wide", "high", "png", "no tables"),
    ],
)
def test_undecodable(encoded, reason):
    with pytest.raises(UndecodableError, match=reason) as raised:
        decode(encoded)
    assert "\n" not in str(raised.value)
