"""JSON that a run writes, with a checksum in it: a flipped bit is no other number."""

import json
from collections.abc import Mapping
from typing import Any

import google_crc32c

CHECKSUM = "crc32c"  # the key that a sealed object has beside its own


class SealError(ValueError):
    """An object is not what was written."""


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with the checksum of all else in it, as its last entry."""
    plain = json.loads(json.dumps(content, allow_nan=False))
    return plain | {CHECKSUM: _checksum(plain)}


def unseal(content: Any) -> dict[str, Any]:
    """What was sealed, without the checksum.

    Args:
      content: a parsed JSON value. An object without a checksum, as earlier versions
        wrote them, is taken as it is.

    Raises:
      SealError: it is no object, or differs from its checksum.
    """
    if not isinstance(content, dict):
        raise SealError("it is no JSON object")
    plain = {key: value for key, value in content.items() if key != CHECKSUM}
    if CHECKSUM in content and content[CHECKSUM] != _checksum(plain):
        raise SealError("it differs from its checksum")
    return plain


def parse(text: str | bytes) -> dict[str, Any]:
    """Parses an object that was sealed.

    Raises:
      SealError: it is not what was written.
    """
    try:
        return unseal(json.loads(text))
    # Of what is no text, no JSON, or nested more deeply than Python can follow.
    except (ValueError, RecursionError) as error:
        if isinstance(error, SealError):
            raise
        raise SealError(f"it is no JSON ({type(error).__name__})") from None


def _checksum(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True)
    return f"{google_crc32c.value(text.encode()):08x}"
