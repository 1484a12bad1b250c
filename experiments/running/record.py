"""What a run keeps on disk as it trains: checkpoints, rows of metrics and events."""

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tensorboardX import SummaryWriter

from experiments.checkpoints.save import Checkpoints
from experiments.distributed import parallel
from experiments.distributed.processes import in_every_process, is_first, print_once
from experiments.running.metrics import MetricsLog
from experiments.training.state import TrainState

States = Mapping[str, TrainState]
CHECKPOINTS = "checkpoints"  # folder of the states that a run saves while it trains


class Measured(NamedTuple):
    """What one evaluation found."""

    rows: Mapping[str, Sequence[Mapping[str, Any]]]  # by the name of their log
    scalars: Mapping[str, float]  # for TensorBoard, by tag
    shown: Mapping[str, str]  # beside the progress bar
    score: float | None = None  # by which the best checkpoint is kept


class Record:
    """The files of one run, which a resumed run takes back to its checkpoint."""

    def __init__(
        self, workdir: Path, config: Mapping[str, Any], logs: Mapping[str, int]
    ) -> None:
        """Names the files; `opened` makes them.

        Args:
          workdir: the folder of the run.
          config: of the run; every checkpoint holds it.
          logs: how many rows an evaluation adds to each of the files NAME.jsonl.
        """
        self._workdir, self._config, self._logs = workdir, config, logs

    @contextlib.contextmanager
    def opened(
        self, states: States, evaluations: Sequence[int]
    ) -> Iterator[tuple[int | None, States]]:
        """Restores the newest checkpoint, and opens the logs at its rows.

        Args:
          states: before the first step.
          evaluations: the steps after which the run is evaluated, increasing.

        Yields:
          The checkpoint's step and states; None and `states` for a run that starts.

        Raises:
          WorkdirError: rows up to the checkpoint are missing.
          CheckpointError: no checkpoint is sound.
        """
        with contextlib.ExitStack() as stack:
            self._checkpoints = Checkpoints(self._workdir / CHECKPOINTS, self._config)
            stack.callback(self._checkpoints.close)
            restored = self._checkpoints.restore_newest(states)
            step = restored[0] if restored else None
            done = [at for at in evaluations if step is not None and at <= step]
            self._open_logs(stack, done, 0 if step is None else step + 1)
            if restored:
                print_once(
                    f"Going on from the checkpoint of step {step} in {self._workdir}."
                )
            yield step, restored[1] if restored else states

    def _open_logs(
        self, stack: contextlib.ExitStack, done: Sequence[int], purge_step: int
    ) -> None:
        self._files = {}
        for name, count in self._logs.items():
            kept = [step for step in done for _ in range(count)]
            path = self._workdir / f"{name}.jsonl"
            log = in_every_process(
                functools.partial(MetricsLog, path, kept, writes=is_first())
            )
            self._files[name] = log
            stack.callback(log.close)
        self._events = SummaryWriter(
            str(self._workdir / "tensorboard"),
            purge_step=purge_step,
            write_to_disk=is_first(),
        )
        stack.callback(self._events.close)

    @property
    def rows(self) -> dict[str, list[dict[str, Any]]]:
        """All rows of each log, those of earlier starts too."""
        return {name: log.rows for name, log in self._files.items()}

    def report(self, step: int, measured: Measured) -> None:
        """Writes what an evaluation found."""
        for name, rows in measured.rows.items():
            for row in rows:
                self._files[name].write(row)
        for tag, value in measured.scalars.items():
            self._events.add_scalar(tag, value, step)

    def save(self, step: int, states: States, score: float | None) -> None:
        """Starts saving a checkpoint, after all rows up to it are on disk."""
        # Rows first: a checkpoint promises that those up to it are there.
        for log in (*self._files.values(), self._events):
            log.flush()
        self._checkpoints.save(step, parallel.as_global(states), score)
