import json

import numpy as np
import pytest

from experiments.running.sealed import CHECKSUM, SealError, parse, seal, unseal

CONTENT = {
    "step": 500,
    "network": "batch_norm",
    "accuracy": [91.13, 90.5, None],
    "nested": {"rate": 1e-05, "done": True, "name": "°"},
}


def test_what_was_sealed_comes_back():
    sealed = seal(CONTENT)
    assert list(sealed)[-1] == CHECKSUM
    assert unseal(sealed) == CONTENT
    assert parse(json.dumps(sealed)) == CONTENT
    assert seal({"a": (1, 2)}) == seal({"a": [1, 2]})


def test_what_earlier_versions_wrote_has_no_checksum():
    assert parse(json.dumps(CONTENT)) == CONTENT


def test_numbers_that_json_lacks_are_not_written():
    with pytest.raises(ValueError, match="not JSON compliant"):
        seal({"loss": float("nan")})


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[1]", b"3", b"null", b"\xff\xfe{}", b"[" * 100_000, b'{"a": 1} x'],
)
def test_what_is_no_object_is_refused(text):
    with pytest.raises(SealError):
        parse(text)


@pytest.mark.parametrize("mutation", ["flipped", "cut", "doubled", "replaced"])
def test_every_mutation_is_noticed_or_leaves_the_values(mutation):
    """500 of a kind; what passes is equal: a number written in another way, say."""
    text = json.dumps(seal(CONTENT)).encode()
    random, noticed = np.random.default_rng(0), 0
    for _ in range(500):
        at, bit = random.integers(len(text)), 1 << int(random.integers(8))
        mutated = {
            "flipped": text[:at] + bytes([text[at] ^ bit]) + text[at + 1 :],
            "cut": text[:at],
            "doubled": text[:at] + text[max(0, at - 5) :],
            "replaced": text[:at] + bytes(random.integers(32, 127, 3)) + text[at + 3 :],
        }[mutation]
        try:
            found = parse(mutated)
        except SealError:
            noticed += 1
            continue
        # A key of another name in place of the checksum is all that may be new.
        assert {key: found.get(key) for key in CONTENT} == CONTENT
    assert noticed > 450
