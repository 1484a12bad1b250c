"""Decodes encoded images: JPEG as ImageNet holds them, and PNG, whatever their name."""

import re
import struct

import cv2
import numpy as np

from experiments.data.splits import UndecodableError

_JPEG_START = b"\xff\xd8\xff"
_PNG_START = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"
_PNG_CHUNK, _PNG_CHECKSUM_BYTES = struct.Struct(">I4s"), 4
_PNG_NOTES = (b"iCCP", b"iTXt", b"zTXt")  # compressed, by up to a factor of 1,000
_PNG_END = b"IEND\xae\x42\x60\x82"

# What a small file may ask of a decoder. Photographs have up to 60 million pixels;
# every scan of a progressive JPEG goes over all of them again.
MAX_PIXELS = 2**26
_MAX_PIXELS_SCANNED = 2**30
_MAX_NOTES_BYTES = 2**18
# Of the longer side to the shorter, which is what resizing starts from.
MAX_RATIO = 100

# A marker of JPEG: the last of any number of bytes 255, and its code. Decoders skip
# what stands between two segments though nothing should.
_MARKER = re.compile(rb"\xff([\x01-\xfe])")
_LONE_CODES = {0x01, *range(0xD0, 0xD8)}  # markers without a segment
_FRAME_CODES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_SEQUENTIAL_CODES = (0xC0, 0xC1)
_SCAN_CODE = 0xDA
_SCAN = b"\xff\xda"
_JPEG_END = b"\xff\xd9"

# The orientation that a camera noted is ignored, as TensorFlow and Pillow ignore it:
# images then look as they do to networks that were trained with those.
_RGB = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
# The names for reduced sizes mean BGR, or grey, unless RGB is asked for, too.
_FLAGS = {
    1: _RGB,
    2: _RGB | cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: _RGB | cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: _RGB | cv2.IMREAD_REDUCED_GRAYSCALE_8,
}


def image_size(encoded: bytes) -> tuple[int, int]:
    """Reads the size of an image from its header, without decoding it.

    Args:
      encoded: a JPEG or PNG file.

    Returns:
      The image's height and width in pixels.

    Raises:
      UndecodableError: if the header is of neither form, incomplete or malformed, if
        the end of the file is missing, or if it claims more pixels than `MAX_PIXELS`,
        or a side of more than `MAX_RATIO` times the other.
    """
    scans = 1
    if encoded.startswith(_JPEG_START):
        height, width, scans = _read_jpeg_header(encoded)
    elif encoded.startswith(_PNG_START):
        height, width = _read_png_header(encoded)
    else:
        raise UndecodableError(
            f"neither a JPEG nor a PNG: {len(encoded)} bytes that begin with "
            f"{encoded[:8]!r}"
        )
    short, long = sorted((height, width))
    if short == 0:
        expected = "at least 1x1"
    elif height * width > MAX_PIXELS:
        expected = f"at most {MAX_PIXELS:,}"
    elif long > MAX_RATIO * short:
        expected = f"a longer side of at most {MAX_RATIO} times the shorter"
    elif height * width * scans > _MAX_PIXELS_SCANNED:
        expected = f"at most {_MAX_PIXELS_SCANNED:,} in all of its {scans} scans"
    else:
        return height, width
    raise UndecodableError(
        f"its header says that it is {height}x{width} pixels: expected {expected}"
    )


def decode(encoded: bytes, at_least: int | None = None) -> np.ndarray:
    """Decodes an image.

    Greyscale becomes RGB of three equal channels; CMYK is taken to be inverted, as
    Adobe's programs write it and Pillow assumes too; transparency is dropped.

    A truncated file is an error, since a decoder would fill the rest with grey. What
    is damaged in the middle of a JPEG cannot be told from what was photographed: it
    decodes to wrong pixels, with at most a line from libjpeg on stderr.

    Args:
      encoded: a JPEG or PNG file. What follows the end of the image is ignored.
      at_least: a JPEG may come out smaller by a factor of 2, 4 or 8, which takes less
        time and leaves no aliasing, as long as its shorter side has this many pixels.
        None: as large as it is.

    Returns:
      RGB, uint8 (height, width, 3).

    Raises:
      UndecodableError: if the image is of neither form, truncated, or cannot be
        decoded. The message says why; the caller knows the image's name.
    """
    size = image_size(encoded)
    factor = 1
    if at_least is not None and encoded.startswith(_JPEG_START):
        factor = max(f for f in _FLAGS if f == 1 or min(size) // f >= at_least)
    try:
        image = cv2.imdecode(np.frombuffer(encoded, np.uint8), _FLAGS[factor])
    except cv2.error as error:  # more pixels than OpenCV reads, for one
        reason = " ".join(str(error).split())
        raise UndecodableError(f"OpenCV cannot decode it: {reason}") from error
    if image is None:
        raise UndecodableError("OpenCV cannot decode it: its content is malformed")
    return image


def _read_jpeg_header(encoded: bytes) -> tuple[int, int, int]:
    """Walks through its segments; returns height, width, and the number of scans."""
    position = len(_JPEG_START) - 1
    frame_code, height, width, channels = 0, 0, 0, b""
    while marker := _MARKER.search(encoded, position):
        position = marker.end()
        code = marker[1][0]
        if code == _SCAN_CODE and frame_code:
            # A thumbnail inside the header has an end of its own, and 255 in the
            # compressed data is never followed by the code of the end, or of a scan.
            if encoded.rfind(_JPEG_END, position) < 0:
                raise UndecodableError("truncated: the JPEG's end-of-image is missing")
            # What has all channels in its first scan has no other.
            scanned = encoded[position + 2 : position + 3]
            if frame_code in _SEQUENTIAL_CODES and scanned == channels:
                return height, width, 1
            return height, width, 1 + encoded.count(_SCAN, position)
        # Read as decoders read them, lest these find another frame than is found here.
        if code in _LONE_CODES:
            continue
        try:
            if code in _FRAME_CODES:
                frame_code = code
                height, width, channels = struct.unpack_from(
                    ">3xHHc", encoded, position
                )
            (length,) = struct.unpack_from(">H", encoded, position)
        except struct.error:
            break
        position += length
    raise UndecodableError("truncated: the JPEG's header is incomplete")


def _read_png_header(encoded: bytes) -> tuple[int, int]:
    """Reads the first chunk, and looks whether the last is there, and at all notes."""
    if encoded.rfind(_PNG_END) < 0:
        raise UndecodableError("truncated: the PNG's end is missing")
    width, height = struct.unpack_from(">II", encoded, len(_PNG_START))
    position, notes = len(_PNG_START) - _PNG_CHUNK.size, 0
    while position + _PNG_CHUNK.size <= len(encoded):
        length, kind = _PNG_CHUNK.unpack_from(encoded, position)
        notes += length if kind in _PNG_NOTES else 0
        position += _PNG_CHUNK.size + length + _PNG_CHECKSUM_BYTES
    if notes > _MAX_NOTES_BYTES:
        raise UndecodableError(
            f"it has {notes:,} bytes of compressed notes: expected at most "
            f"{_MAX_NOTES_BYTES:,}"
        )
    return height, width
