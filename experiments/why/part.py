"""What a part of the experiment is."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from experiments.why.data import Data

Config = Mapping[str, Any]
Setting = Mapping[str, Any]  # JSON values; {} where a part has but one
Measured = dict[str, Any]  # JSON values
# Of a setting: its "setting" and what was "measured".
Row = Mapping[str, Any]


class Part(NamedTuple):
    """A question, what is measured for each of its settings, and how it is shown."""

    title: str
    settings: Callable[[Config], list[dict[str, Any]]]
    measure: Callable[[Config, Data, Setting], Measured]
    draw: Callable[[Sequence[Row]], Figure]
    tables: Callable[[Sequence[Row]], str]  # Markdown
