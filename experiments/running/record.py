"""What a run keeps on disk as it trains: checkpoints, rows of metrics and events."""

import contextlib
import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tensorboardX import SummaryWriter

from experiments.checkpoints.save import Check, Checkpoints, Restored
from experiments.checkpoints.stored import Metadata
from experiments.configuration.fields import Configuration, as_json
from experiments.distributed import parallel
from experiments.distributed.processes import (
    KNOWN_TO_ALL,
    in_every_process,
    is_first,
    print_once,
)
from experiments.running import provenance, stopping
from experiments.running.metrics import NO_ROWS, Kept, MetricsLog
from experiments.running.workdir import WorkdirError
from experiments.training.state import TrainState

States = Mapping[str, TrainState]
# The mean losses of each network since the last look, () or (replicas,).
Losses = Mapping[str, np.ndarray]
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
        self,
        workdir: Path,
        config: Mapping[str, Any],
        configuration: Configuration,
        logs: Collection[str],
    ) -> None:
        """Names the files; `opened` makes them.

        Args:
          workdir: the folder of the run.
          config: of the run; every checkpoint holds it.
          configuration: what in it a run that goes on may change.
          logs: NAME of each of the files NAME.jsonl.
        """
        self._workdir, self._config = workdir, config
        self._configuration, self._logs = configuration, logs

    @contextlib.contextmanager
    def opened(
        self, states: States, evaluations: Collection[int]
    ) -> Iterator[tuple[int, States, Losses | None]]:
        """Restores the newest checkpoint, or saves the first, and opens the logs.

        There is a checkpoint before there is any row: rows without one mean that it
        has been lost.

        Args:
          states: before the first step.
          evaluations: the steps after which the run is evaluated.

        Yields:
          The steps done, the states, and the losses that an evaluation of this step is
          to report; None if it has been made.

        Raises:
          WorkdirError: rows up to the checkpoint are missing, or there are rows and no
            checkpoint.
          CheckpointError: no checkpoint is sound, or it is of another run.
        """
        with contextlib.ExitStack() as stack:
            self._checkpoints = Checkpoints(self._workdir / CHECKPOINTS, self._config)
            stack.callback(self._checkpoints.close)
            restored = self._checkpoints.restore_newest(
                states, same_run(self._config, self._configuration)
            )
            kept = self._check_rows(restored)
            self._open_logs(stack, kept, restored.step + 1 if restored else 0)
            if restored is None:
                first: Losses | None = {} if 0 in evaluations else None
                self.save(0, states, None, first)
                self._checkpoints.wait()
                yield 0, states, first
            else:
                self._say(restored)
                yield restored.step, restored.states, _losses_of(restored.metadata)

    def _say(self, restored: Restored) -> None:
        step, saved = restored.step, restored.metadata.provenance
        print_once(f"Going on from the checkpoint of step {step} in {self._workdir}.")
        changed = [
            f"{name} {version} in place of {saved[name]}"
            for name, version in provenance.versions().items()
            if saved.get(name, version) != version
        ]
        if changed:
            print_once(f"From here on with {', '.join(changed)}: numbers may differ.")
        stopping.set_what_remains(lambda: f"the same command goes on from step {step}")

    def _check_rows(self, restored: Restored | None) -> Mapping[str, Kept | int]:
        """The rows of each log to keep."""
        if restored is None:
            paths = [self._path(name) for name in self._logs]
            if rows := [
                path for path in paths if path.exists() and path.stat().st_size
            ]:
                error = WorkdirError(
                    f"{rows[0]} has rows, but there is no checkpoint in "
                    f"{self._workdir / CHECKPOINTS}: expected those that were saved "
                    "with them; restore them, or choose another --workdir."
                )
                error.add_note(KNOWN_TO_ALL)
                raise error
            return dict.fromkeys(self._logs, NO_ROWS)
        if restored.metadata.rows is None:  # of an earlier version
            return dict.fromkeys(self._logs, restored.step)
        return {name: restored.metadata.rows[name] for name in self._logs}

    def _path(self, log: str) -> Path:
        return self._workdir / f"{log}.jsonl"

    def _open_logs(
        self,
        stack: contextlib.ExitStack,
        kept: Mapping[str, Kept | int],
        purge_step: int,
    ) -> None:
        self._files = {}
        for name, rows in kept.items():
            log = in_every_process(
                functools.partial(MetricsLog, self._path(name), rows, writes=is_first())
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

    def save(
        self,
        step: int,
        states: States,
        score: float | None,
        losses: Losses | None = None,
    ) -> None:
        """Starts saving a checkpoint, after all rows up to it are on disk.

        Args:
          step: steps done.
          states: after them.
          score: of the evaluation of this step.
          losses: what the evaluation of this step is to report, if it is to come.

        Raises:
          WorkdirError: files of the run are no longer where they were.
        """
        # Rows first: a checkpoint promises that those up to it are there.
        for log in (*self._files.values(), self._events):
            log.flush()
        in_every_process(self._check_files)
        self._checkpoints.save(
            step,
            parallel.as_global(states),
            score,
            rows={name: log.kept for name, log in self._files.items()},
            losses=None
            if losses is None
            else {name: np.asarray(mean).tolist() for name, mean in losses.items()},
        )
        stopping.set_what_remains(lambda: f"the same command goes on from step {step}")

    def _check_files(self) -> None:
        for log in self._files.values():
            log.check()


def same_run(config: Mapping[str, Any], configuration: Configuration) -> Check:
    """Returns what says why a checkpoint is not of a run; an empty text if it is.

    Args:
      config: of the run.
      configuration: what in it a run that goes on may change.
    """
    wanted = as_json(dict(config))

    def difference(metadata: Metadata) -> str:
        differences = configuration.differences(metadata.config, wanted)
        if differences:
            return (
                f"is of a run of another configuration: {'; '.join(differences)}. Give "
                "that configuration, or choose another --workdir."
            )
        saved, now = metadata.provenance.get("settings", {}), provenance.settings()
        differences = [
            f"{name}={saved[name]}, and it is {value} now"
            for name, value in now.items()
            if saved.get(name, value) != value
        ]
        if differences:
            return (
                f"was saved with {'; '.join(differences)}: other numbers would follow. "
                "Set it as it was, or choose another --workdir."
            )
        return ""

    return difference


def _losses_of(metadata: Metadata) -> Losses | None:
    if metadata.losses is None:
        return None
    return {
        name: np.asarray(mean, np.float32) for name, mean in metadata.losses.items()
    }
