"""A progress bar for long work: rate, results so far, and the time that is left."""

import sys
from typing import Any

from tqdm import tqdm

from experiments.distributed.processes import is_first


def progress_bar(
    total: int, done: int, unit: str, *, shown: bool = True
) -> "tqdm[None]":
    """A bar on standard error; on something other than a terminal, a line at times.

    Of several processes the first alone shows it.

    Args:
      total: units of work in all.
      done: units that an earlier run did.
      unit: what one is called.
      shown: nothing is, otherwise.
    """
    on_terminal = sys.stderr.isatty()
    return (tqdm if on_terminal else _Lines)(
        total=total,
        initial=done,
        unit=f" {unit}",
        mininterval=0.5 if on_terminal else 10,
        dynamic_ncols=True,
        disable=not (shown and is_first()),
    )


class _Lines(tqdm):  # type: ignore[misc]  # which has no types
    """Lines that each stand by themselves, for a log file."""

    disable: bool

    def display(self, *_: Any, **__: Any) -> None:
        print(self, file=sys.stderr, flush=True)

    def close(self) -> None:
        if not self.disable:
            self.display()
        self.disable = True
