import math

import pytest

from experiments.configs.checks import (
    ConfigError,
    as_tuple,
    check_at_least,
    check_keys,
    check_one_of,
    check_positive,
    check_shares,
)


def test_missing_keys_are_named():
    check_keys({"a": 1, "b": 2}, "ab")
    with pytest.raises(ConfigError, match="lacks a, c; start from get_config"):
        check_keys({"b": 2}, "cba")


@pytest.mark.parametrize("value", [2, 7, (2, 3), [5], (), 2**31 - 1])
def test_at_least_accepts(value):
    check_at_least({"key": value}, 2, "key")


@pytest.mark.parametrize("value", [1, -3, (2, 1), 2.5, math.nan, "2", (2, "x"), 2**31])
def test_at_least_refuses(value):
    with pytest.raises(ConfigError, match=r"^--config\.key=.*: expected at least 2, "):
        check_at_least({"other": 2, "key": value}, 2, "other", "key")


@pytest.mark.parametrize("value", [1e-30, 3, (0.1, 5.0)])
def test_positive_accepts(value):
    check_positive({"key": value}, "key")


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, "1", (), (1.0, 0.0)])
def test_positive_refuses(value):
    with pytest.raises(ConfigError, match=r"^--config\.key=.*: expected a positive"):
        check_positive({"other": 2.0, "key": value}, "other", "key")


@pytest.mark.parametrize("value", [0, 1, 0.0, 1.0, 0.3])
def test_shares_accepts(value):
    check_shares({"key": value}, "key")


@pytest.mark.parametrize("value", [-1e-9, 1.01, 2, math.nan, math.inf, "0.5", None])
def test_shares_refuses(value):
    with pytest.raises(ConfigError, match=r"^--config\.key=.*: expected 0 to 1\.$"):
        check_shares({"other": 0.5, "key": value}, "other", "key")


def test_one_of():
    choices = {"one": ("a", "b"), "other": (96, 128)}
    check_one_of({"one": "b", "other": 96}, choices)
    with pytest.raises(ConfigError, match=r"^--config\.one=c: expected one of a, b\.$"):
        check_one_of({"one": "c", "other": 96}, choices)
    with pytest.raises(ConfigError, match=r"^--config\.other=64: .* of 96, 128\.$"):
        check_one_of({"one": "a", "other": 64}, choices)


def test_as_tuple():
    assert as_tuple(3) == (3,)
    assert as_tuple([3, 4]) == as_tuple((3, 4)) == (3, 4)
    assert as_tuple("ab") == ("ab",)
