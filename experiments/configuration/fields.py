"""Fields of a configuration: each says all about itself, the rest follows from it.

From a field's declaration follow its flag and its line of --help, how its values are
checked, whether a run that goes on may change it, and whether runs that differ in it
are one model.
"""

import dataclasses
import enum
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple


class ConfigError(ValueError):
    """A configuration value makes no sense."""


class Role(enum.Enum):
    """What a field is for."""

    NUMBERS = "changes the numbers"
    SEED = "tells runs of one model apart"
    NAME = "names the run"
    LENGTH = "how long to train: another start may make it larger"
    LAUNCH = "only launches: another start may change it"


class Check(NamedTuple):
    """What every value of a field, or each entry of a tuple, must be."""

    holds: Callable[[Any], bool]
    expected: str


class Field(NamedTuple):
    """One thing that can be chosen."""

    default: Any
    help: str
    check: Check | None = None
    choices: Sequence[Any] = ()  # all that the value, or each entry, may be
    role: Role = Role.NUMBERS
    formerly: str = ""  # its name in folders of earlier versions


def at_least(minimum: int) -> Check:
    """A whole number of 32 bits that is not below a minimum."""
    return Check(
        lambda value: _is_whole(value) and minimum <= value < 2**31,
        f"at least {minimum}, a whole number below 2^31",
    )


def positive() -> Check:
    """A finite number above 0."""
    return Check(
        lambda value: _is_number(value) and 0 < value < math.inf, "a positive number"
    )


def share(*, positive: bool = False) -> Check:
    """A number from 0 to 1, which may have to be more than 0."""
    return Check(
        lambda value: (
            _is_number(value) and 0 <= value <= 1 and (value > 0 or not positive)
        ),
        "more than 0, at most 1" if positive else "0 to 1",
    )


@dataclasses.dataclass(frozen=True)
class Configuration:
    """All fields of an experiment, and its named variants.

    Attributes:
      fields: by key.
      variants: by name, what `changes` takes the values from that each changes.
      sizes: that a variant's name may have after a comma.
      changes: from a variant and a size, "" for none, to these values; None: they are
        what stands in `variants`.
      why_as_long: why a run with certain values cannot be made longer: what it has
        done would have been something else. Empty if it can.
    """

    fields: Mapping[str, Field]
    variants: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sizes: Sequence[str] = ()
    changes: Callable[[str, str], Mapping[str, Any]] | None = None
    why_as_long: Callable[[Mapping[str, Any]], str] = lambda config: ""

    def values(self, variant: str = "") -> dict[str, Any]:
        """The configuration of a variant.

        Args:
          variant: a name, a comma and a size, or either alone, as "bn_x5,small".

        Raises:
          ValueError: there is no such variant.
        """
        name, _, size = variant.partition(",")
        if name not in ("", *self.variants) or size not in ("", *self.sizes):
            known = f"expected {self.names()}" if self.variants else "there are none"
            raise ValueError(f"unknown variant {variant!r}; {known}.")
        defaults = {key: field.default for key, field in self.fields.items()}
        if self.changes is None:
            return defaults | self.variants.get(name, {})
        return defaults | dict(self.changes(name, size))

    def names(self) -> str:
        """All variants in words; empty if there are none."""
        sizes = ", ".join(f",{size}" for size in self.sizes)
        after = f", each also with one of {sizes} after it" if sizes else ""
        return ", ".join(self.variants) + after

    def keys(self, *roles: Role) -> list[str]:
        """The keys of fields with certain roles, and their former names."""
        chosen = {key: f for key, f in self.fields.items() if f.role in roles}
        return [*chosen, *(f.formerly for f in chosen.values() if f.formerly)]

    def check(self, config: Mapping[str, Any]) -> None:
        """Checks every value by itself.

        Raises:
          ConfigError: a key is missing, or a value makes no sense.
        """
        if missing := sorted(set(self.fields) - set(config)):
            raise ConfigError(
                f"the configuration lacks {', '.join(missing)}; start from get_config()"
                " of the experiment's own file."
            )
        for key, field in self.fields.items():
            expected = _fault(field, config[key])
            if expected:
                raise ConfigError(f"--config.{key}={config[key]}: expected {expected}.")

    def describe(self) -> str:
        """Help for every field and of the variants, in lines of 80 columns."""
        lines = ["Configuration keys and their defaults:"]
        for key, field in self.fields.items():
            default = field.default
            if isinstance(default, tuple) and len(default) > 1:
                default = ",".join(map(str, default))
            lines += [f"  --config.{key}={default}", _indented(_meaning(field))]
        if self.variants:
            lines += ["Other defaults: --config=VARIANT", _indented(self.names())]
        return "\n".join([*lines, "Those of a file of yours: --config=FILE[:VARIANT]"])

    def differences(
        self, earlier: Mapping[str, Any], now: Mapping[str, Any]
    ) -> list[str]:
        """Where two configurations of a run differ in more than how it is launched.

        Args:
          earlier: of a run's folder. A field that it lacks had its default; what else
            an earlier version did not write down is not compared.
          now: of the same run, started again.
        """
        absent = "absent"
        launching, lengths = self.keys(Role.LAUNCH), self.keys(Role.LENGTH)
        known = {key: field.default for key, field in self.fields.items()}
        found = []
        for key in sorted(earlier.keys() | (now.keys() & known)):
            before = earlier.get(key, as_json(known.get(key)))
            after = now.get(key, absent)
            if key in launching or _is_same(before, after):
                continue
            difference = f"{key}: {before} there, {after} now"
            if key in lengths and _is_longer(before, after):
                if not (reason := self.why_as_long(now)):
                    continue
                difference += f", which would change the past ({reason})"
            found.append(difference)
        return found

    def extension(self, earlier: Mapping[str, Any], now: Mapping[str, Any]) -> str:
        """Says by how much a run becomes longer; empty if it does not.

        Args:
          earlier: of a run's folder.
          now: of the same run, with no `differences`.
        """
        return ", ".join(
            f"{key} from {earlier[key]:,} to {now[key]:,}"
            for key in self.keys(Role.LENGTH)
            if _is_longer(earlier.get(key), now.get(key))
        )


def _is_same(earlier: Any, now: Any) -> bool:
    if isinstance(earlier, Mapping) and isinstance(now, Mapping):
        return all(value == now.get(key) for key, value in earlier.items())
    return bool(earlier == now)


def _is_longer(earlier: Any, now: Any) -> bool:
    return _is_whole(earlier) and _is_whole(now) and now > earlier


def as_tuple(value: Any) -> tuple[Any, ...]:
    """A value that may be one or several, as several."""
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def as_json(value: Any) -> Any:
    """A value as JSON gives it back."""
    if isinstance(value, Mapping):
        return {key: as_json(entry) for key, entry in value.items()}
    return list(map(as_json, value)) if isinstance(value, tuple | list) else value


def _fault(field: Field, value: Any) -> str:
    """What is expected instead of a value; nothing if it is right."""
    several = isinstance(field.default, tuple)
    if several and isinstance(value, str):
        return "several values, with commas"
    if isinstance(field.default, bool) and not isinstance(value, bool):
        return "True or False"
    for entry in as_tuple(value):
        if field.choices and entry not in field.choices:
            return f"{'some' if several else 'one'} of {_listed(field.choices)}"
        if field.check is not None and not field.check.holds(entry):
            return field.check.expected
    if field.check is not None and not as_tuple(value):
        return f"at least one value: {field.check.expected}"
    return ""


def _indented(text: str) -> str:
    margin = 6 * " "
    return textwrap.fill(
        text,
        80,
        initial_indent=margin,
        subsequent_indent=margin,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _meaning(field: Field) -> str:
    listed = f" ({_listed(field.choices)})" if field.choices else ""
    return f"{field.help}{listed}"


def _listed(choices: Sequence[Any]) -> str:
    return ", ".join(map(str, choices))


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
