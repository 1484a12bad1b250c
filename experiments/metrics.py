"""Measurements over a run, as JSON lines that a resumed run can take back to a step."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.workdir import write_whole


class MetricsLog:
    """A file of rows, each a JSON object with the `step` that it was measured at.

    Rows are put on disk before the checkpoint of their step is, so a run that goes on
    from a checkpoint has all rows up to it. The later ones, which it will measure
    again, are dropped.
    """

    def __init__(self, path: Path, last_step: int | None) -> None:
        """Opens the file, keeping the rows up to a step, or none."""
        self._path = path
        self.rows = [
            row
            for row in read_rows(path)
            if last_step is not None and row["step"] <= last_step
        ]
        write_whole(path, "".join(_line(row) for row in self.rows))
        self._file = path.open("a")

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends a row of JSON values. Numbers that are not finite become null."""
        finite = {key: _finite(value) for key, value in row.items()}
        self.rows.append(finite)
        self._file.write(_line(finite))

    def flush(self) -> None:
        """Makes sure that all rows are on disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Puts all rows on disk and closes the file."""
        self.flush()
        self._file.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file, without one that a killed run left unfinished."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return value
