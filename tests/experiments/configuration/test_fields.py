import math

import pytest

from experiments.configuration.fields import (
    ConfigError,
    Configuration,
    Field,
    Role,
    as_json,
    as_tuple,
    at_least,
    positive,
    share,
)

FIELDS = {
    "steps": Field(3, "how long", at_least(2)),
    "rates": Field((0.1,), "how fast", positive()),
    "kind": Field("a", "which", choices=("a", "b")),
    "kinds": Field(("a",), "which ones", choices=("a", "b")),
    "bright": Field(True, "whether"),
    "seed": Field(0, "of all", at_least(0), role=Role.SEED),
    "workers": Field(1, "helpers", role=Role.LAUNCH, formerly="threads"),
}
CONFIGURATION = Configuration(FIELDS, {"long": {"steps": 9}})


def refused(**changes):
    with pytest.raises(ConfigError) as caught:
        CONFIGURATION.check(CONFIGURATION.values() | changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_values_of_variants():
    assert CONFIGURATION.values() == {k: field.default for k, field in FIELDS.items()}
    assert CONFIGURATION.values("long") == CONFIGURATION.values() | {"steps": 9}
    CONFIGURATION.check(CONFIGURATION.values("long"))


def test_missing_keys_are_named():
    with pytest.raises(ConfigError, match=r"lacks kind, steps; start from get_config"):
        CONFIGURATION.check({key: 1 for key in FIELDS if key not in ("kind", "steps")})


@pytest.mark.parametrize("value", [2, 7, 2**31 - 1])
def test_at_least_accepts(value):
    CONFIGURATION.check(CONFIGURATION.values() | {"steps": value})


@pytest.mark.parametrize("value", [1, -3, 2.5, math.nan, "2", 2**31, True, None])
def test_at_least_refuses(value):
    expected = (
        f"--config.steps={value}: expected at least 2, a whole number below 2^31."
    )
    assert refused(steps=value) == expected


@pytest.mark.parametrize("value", [(1e-30,), 3, (0.1, 5.0), [7]])
def test_positive_accepts_one_or_several(value):
    CONFIGURATION.check(CONFIGURATION.values() | {"rates": value})


@pytest.mark.parametrize("value", [0, (-1.0,), math.nan, math.inf, "1", (1.0, 0.0)])
def test_positive_refuses(value):
    assert refused(rates=value).startswith(f"--config.rates={value}: expected ")


def test_an_empty_tuple_of_numbers_is_refused():
    assert "expected at least one value: a positive number." in refused(rates=())


@pytest.mark.parametrize(
    ("check", "right", "wrong"),
    [
        (share(), [0, 1, 0.0, 0.3], [-1e-9, 1.01, 2, math.nan, math.inf, "0.5", None]),
        (share(positive=True), [1e-9, 1], [0, 0.0, -0.1, 1.1, math.nan]),
    ],
)
def test_shares(check, right, wrong):
    assert all(map(check.holds, right))
    assert not any(map(check.holds, wrong))


def test_choices():
    assert refused(kind="c") == "--config.kind=c: expected one of a, b."
    assert refused(kinds=("a", "c")).endswith("expected some of a, b.")
    assert refused(kinds="a").endswith("expected several values, with commas.")
    assert refused(bright=1).endswith("expected True or False.")


def test_roles_give_keys_and_former_names():
    assert CONFIGURATION.keys(Role.LAUNCH) == ["workers", "threads"]
    assert CONFIGURATION.keys(Role.SEED) == ["seed"]


def test_help_names_every_field_with_its_choices():
    text = CONFIGURATION.describe()
    for key, field in FIELDS.items():
        assert f"  --config.{key}=" in text
        assert f"\n      {field.help}" in text
    assert "which ones (a, b)" in text


def test_variants_are_named_in_help_and_where_one_is_unknown():
    changes = {"short": {"steps": 1}, "long": {"steps": 9}}
    configuration = Configuration(FIELDS, changes, sizes=("small",))
    assert configuration.values("long")["steps"] == 9
    assert configuration.values("long,small") == configuration.values("long")
    names = "short, long, each also with one of ,small after it"
    assert f"--config=VARIANT\n      {names}\n" in configuration.describe()
    for unknown in ("lon", "long,smal", "long,small,", "small"):
        with pytest.raises(ValueError, match=f"'{unknown}'; expected {names}."):
            configuration.values(unknown)
    with pytest.raises(ValueError, match=r"'long'; there are none\."):
        Configuration(FIELDS).values("long")


def test_help_is_80_columns_wide():
    wide = Field(tuple(range(20)), "words " * 30, choices=range(100))
    text = Configuration(FIELDS | {"wide": wide}, {"v" * 70: {}, "w": {}}).describe()
    assert max(map(len, text.splitlines())) <= 80
    assert f"--config.wide={','.join(map(str, range(20)))}\n" in text


def test_differences_of_a_run_that_goes_on():
    now = CONFIGURATION.values()
    earlier = {"steps": 3, "rates": [0.1], "threads": 16}
    assert CONFIGURATION.differences(earlier, as_json_values(now)) == []
    other = as_json_values(now | {"kind": "b", "workers": 7})
    assert CONFIGURATION.differences(earlier, other) == ["kind: a there, b now"]
    assert CONFIGURATION.differences(earlier | {"data": 5}, as_json_values(now)) == [
        "data: 5 there, absent now"
    ]


def as_json_values(config):
    return {key: as_json(value) for key, value in config.items()}


def test_as_tuple():
    assert as_tuple(3) == (3,)
    assert as_tuple([3, 4]) == as_tuple((3, 4)) == (3, 4)
    assert as_tuple("ab") == ("ab",)
