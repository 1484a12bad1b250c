"""Measurements over a run, as JSON lines that a resumed run can take back to a step."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import google_crc32c

from experiments.running import sealed
from experiments.running.workdir import WorkdirError, is_same_file, write_whole


class Kept(NamedTuple):
    """What a checkpoint remembers of a log: the rows that were there."""

    num_rows: int
    crc32c: str  # of their lines, hexadecimal


NO_ROWS = Kept(0, "00000000")


class MetricsLog:
    """A file of rows, each a JSON object with the `step` that it was measured at.

    Rows are put on disk before the checkpoint of their step is, so a run that goes on
    from a checkpoint has all rows up to it. The later ones, which it will measure
    again, are dropped.
    """

    def __init__(
        self, path: Path, kept: Kept | int | None = None, writes: bool = True
    ) -> None:
        """Opens the file and drops what it has after the rows to keep.

        Args:
          path: the file; made if it is missing.
          kept: the rows to keep; or, of a checkpoint that remembers none, the last
            step of those to keep; or None for all.
          writes: of several processes one writes the file; the others remember.

        Raises:
          WorkdirError: these rows are not there as they were; nothing was changed.
        """
        self.path = path
        # Damage to rows that are dropped does no harm.
        self.rows, fault = _sound_rows(path)
        if kept is None:
            self.rows = read_rows(path)
        elif isinstance(kept, Kept):
            self.rows = self.rows[: kept.num_rows]
            if self.kept != kept:
                raise WorkdirError(
                    f"{path} is damaged, or of another run: its first {kept.num_rows} "
                    "rows are not those that the checkpoint was saved with"
                    f"{fault and f' ({fault})'}; restore it, or choose another "
                    "--workdir."
                )
        else:
            self.rows = [row for row in self.rows if row["step"] <= kept]
        self._file: TextIO | None = None
        if writes:
            write_whole(path, "".join(map(_line, self.rows)))
            self._file = path.open("a")

    @property
    def kept(self) -> Kept:
        """What a checkpoint is to remember of the rows so far."""
        lines = "".join(map(_line, self.rows))
        return Kept(len(self.rows), f"{google_crc32c.value(lines.encode()):08x}")

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends a row of JSON values. Numbers that are not finite become null."""
        # As a reader will have it: tuples are lists there, and keys texts.
        self.rows.append(json.loads(json.dumps(finite(row))))
        if self._file is not None:
            self._file.write(_line(self.rows[-1]))
            # For whoever watches the run; `flush` is what makes it last.
            self._file.flush()

    def check(self) -> None:
        """Checks that what is written is still what others see.

        Raises:
          WorkdirError: the file was deleted, moved or replaced.
        """
        if self._file is not None and not is_same_file(self._file, self.path):
            raise WorkdirError(
                f"{self.path} was deleted or replaced while the run wrote to it; start "
                "the same command again, if the checkpoints are still there."
            )

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
    """The rows of a JSON-lines file, without one that a killed run left unfinished.

    Raises:
      WorkdirError: a row is not what was written.
    """
    rows, fault = _sound_rows(path)
    if fault:
        raise WorkdirError(
            f"{path} is damaged: {fault}; restore it, or delete that line and those "
            "after it, if a run can measure them again."
        )
    return rows


def _sound_rows(path: Path) -> tuple[list[dict[str, Any]], str]:
    """The rows before the first that is damaged, and what is wrong with that one."""
    if not path.exists():
        return [], ""
    rows: list[dict[str, Any]] = []
    # The last piece is empty, or a row without its end.
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            rows.append(sealed.parse(line))
        except sealed.SealError as error:
            return rows, f"line {number}: {error}"
    return rows, ""


def finite(value: Any) -> Any:
    """A JSON value with null for every number in it that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return value


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(sealed.seal(row), allow_nan=False) + "\n"
