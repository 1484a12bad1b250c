"""Measurements over a run, as JSON lines that a resumed run can take back to a step."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from experiments.running.workdir import WorkdirError, write_whole


class MetricsLog:
    """A file of rows, each a JSON object with the `step` that it was measured at.

    Rows are put on disk before the checkpoint of their step is, so a run that goes on
    from a checkpoint has all rows up to it. The later ones, which it will measure
    again, are dropped.
    """

    def __init__(self, path: Path, steps: Sequence[int], writes: bool = True) -> None:
        """Opens the file and drops what it has after the rows to keep.

        Args:
          path: the file; made if it is missing.
          steps: the step of every row to keep, from the first on.
          writes: of several processes one writes the file; the others remember.

        Raises:
          WorkdirError: not all of these rows are there; nothing was changed.
        """
        self.rows = read_rows(path)[: len(steps)]
        if [row.get("step") for row in self.rows] != list(steps):
            raise WorkdirError(
                f"{path} is damaged: rows up to step {steps[-1]} are missing; restore "
                "it, or choose another --workdir."
            )
        self._file: TextIO | None = None
        if writes:
            write_whole(path, "".join(_line(row) for row in self.rows))
            self._file = path.open("a")

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends a row of JSON values. Numbers that are not finite become null."""
        known = finite(row)
        self.rows.append(known)
        if self._file is not None:
            self._file.write(_line(known))
            # For whoever watches the run; `flush` is what makes it last.
            self._file.flush()

    def flush(self) -> None:
        """Makes sure that all rows are on disk."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Puts all rows on disk and closes the file."""
        self.flush()
        if self._file is not None:
            self._file.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file, without one that a killed run left unfinished."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_bytes().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def finite(value: Any) -> Any:
    """A JSON value with null for every number in it that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [finite(entry) for entry in value]
    return value


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"
