"""Checkpoints: written whole or not at all, and checked when they are read."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from experiments.checkpoints.orbax_messages import silence_leftovers
from experiments.checkpoints.stored import (
    ARRAY_ITEMS,
    METADATA_ITEM,
    CheckpointError,
    DamagedError,
    Metadata,
    best_step,
    cause_of,
    encode,
    listing,
    mismatches,
    named_leaves,
    read_arrays,
    read_metadata,
    read_score,
    record_of,
    stored_steps,
)
from experiments.distributed.agreement import as_first_process, first_message
from experiments.distributed.processes import (
    KNOWN_TO_ALL,
    in_every_process,
    in_first_process,
    print_once,
)
from experiments.running import provenance
from experiments.running.metrics import Kept, finite
from experiments.training.state import TrainState

# From what a checkpoint says about itself to why it is not to be gone on with; empty if
# it is.
Check = Callable[[Metadata], str]
NEWEST = 2  # kept, beside the best: one while the other is being written
_DAMAGED = "damaged: "  # what a message between processes starts with


class Restored(NamedTuple):
    """A checkpoint that was read."""

    step: int  # steps done
    states: dict[str, TrainState]
    metadata: Metadata


class Checkpoints:
    """The checkpoints of one run, in one folder, one subfolder a step.

    Orbax writes them in the background; the newest and the best are kept. Beside the
    arrays lies a checksum of each: Orbax does not notice a flipped bit. In a run of
    several processes all make the same calls, and see the same folder.
    """

    def __init__(
        self, directory: Path, config: Mapping[str, Any] | None = None
    ) -> None:
        """Names the folder, which the first save makes.

        Args:
          directory: of these checkpoints alone.
          config: of the run; JSON values, which every checkpoint will hold.
        """
        self._directory = directory.absolute()
        self._config = dict(config or {})
        self._scores: dict[int, float | None] = {}
        self._opened = contextlib.ExitStack()

    def save(
        self,
        step: int,
        states: Mapping[str, TrainState],
        score: float | None = None,
        *,
        rows: Mapping[str, Kept] | None = None,
        losses: Mapping[str, Any] | None = None,
    ) -> None:
        """Starts saving; the arrays may be overwritten as soon as this returns.

        Args:
          step: steps done.
          states: a state a network; on all processes the same.
          score: of the best, the highest, is kept. None or NaN if there is none.
          rows: as `Metadata` has them.
          losses: as `Metadata` has them; JSON values.

        Raises:
          CheckpointError: this or the save before failed, or there is a checkpoint of
            this step or a later one.
        """
        items = _split(states)
        score = None if score is None else finite(float(score))
        metadata = Metadata(
            step=step,
            score=score,
            config=self._config,
            provenance=provenance.describe(),
            arrays={
                name: record_of(_on_host(name, leaf))
                for name, leaf in named_leaves(items).items()
            },
            rows=None if rows is None else dict(rows),
            losses=None if losses is None else finite(losses),
        )
        arrays = {name: ocp.args.StandardSave(items[name]) for name in ARRAY_ITEMS}
        with self._writing():
            manager = self._manager
            self._scores[step] = score
            saved = manager.save(
                step,
                args=ocp.args.Composite(
                    **{METADATA_ITEM: ocp.args.JsonSave(encode(metadata))}, **arrays
                ),
            )
        if not saved:
            raise CheckpointError(
                f"no checkpoint was written for step {step}: {self._directory} has it, "
                "or a newer one, already; use another workdir."
            )

    def restore_newest(
        self, like: Mapping[str, TrainState], check: Check | None = None
    ) -> Restored | None:
        """Restores the newest sound checkpoint, as the function of this name does.

        Damaged ones that are newer are renamed, so that their steps can be saved again.
        To be called before the first save.
        """
        return restore_newest(self._directory, like, check, set_aside=True)

    def wait(self) -> None:
        """Waits until what was saved is on disk."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and releases the folder."""
        with self._writing():
            self._opened.close()

    @functools.cached_property
    def _manager(self) -> ocp.CheckpointManager:
        # Made late: what is restored, set aside or only looked at comes before.
        self._scores = {
            step: read_score(self._directory / str(step))
            for step in stored_steps(self._directory)
        }
        silence_leftovers()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_NewestAndBest(self._scores),
            cleanup_tmp_directories=True,  # of killed runs
        )
        manager = ocp.CheckpointManager(self._directory, options=options)
        self._opened.callback(manager.close)
        return manager

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        # What the background thread raises, a full disk mostly, comes up anywhere here.
        try:
            yield
        except Exception as error:
            raise CheckpointError(
                f"cannot write a checkpoint to {self._directory} ({cause_of(error)}); "
                "after a remedy the same command goes on from the one before."
            ) from error


class _NewestAndBest:
    """Which checkpoints to keep.

    Orbax's own policies lose the scores, and so the best, when a run is restarted.
    """

    def __init__(self, scores: Mapping[int, float | None]) -> None:
        self._scores = scores

    def should_preserve(
        self, checkpoints: Sequence[Any], *, context: object
    ) -> Sequence[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        best = best_step({step: self._scores.get(step) for step in steps})
        kept = {*steps[-NEWEST:], best}
        return [step in kept for step in steps]


def restore_newest(
    directory: Path,
    like: Mapping[str, TrainState],
    check: Check | None = None,
    *,
    set_aside: bool = False,
) -> Restored | None:
    """Restores the newest sound checkpoint, or returns None if there is none at all.

    Says on one line which damaged ones it passes over. Processes agree: a checkpoint is
    sound if all of them have found it so. Each reads it whole into host memory.

    Args:
      directory: of one run's checkpoints; need not exist.
      like: states of the same structure and shapes, placed on devices as the restored
        ones are to be. Their number may differ from that of the run that saved.
      check: says whether the newest sound one is to be restored.
      set_aside: rename those passed over, from STEP to STEP.damaged.

    Raises:
      CheckpointError: no checkpoint is sound, one is of another network or does not
        pass the check, or the system cannot read it.
    """
    items = _split(like)
    targets = named_leaves(items)
    damaged: dict[Path, str] = {}
    steps = in_every_process(lambda: stored_steps(directory))
    for step in reversed(as_first_process(steps)):
        folder = directory.absolute() / str(step)
        metadata, arrays, problem = _try_to_read(folder, targets, check)
        problem = first_message(problem)
        if not problem:
            assert metadata is not None
            in_first_process(lambda: _report(damaged, set_aside))
            leaves = [_place(arrays[name], leaf) for name, leaf in targets.items()]
            restored = jax.tree.unflatten(jax.tree.structure(items), leaves)
            states = {
                name: TrainState(*(restored[item][name] for item in ARRAY_ITEMS))
                for name in like
            }
            return Restored(step, states, metadata)
        if not problem.startswith(_DAMAGED):
            raise _agreed(problem)
        damaged[folder] = problem.removeprefix(_DAMAGED)
    if damaged:
        reasons = [f"{folder.name} ({reason})" for folder, reason in damaged.items()]
        raise _agreed(
            f"no checkpoint in {directory} is sound: {listing(reasons, 3)}; restore "
            "one, or move that folder away to start anew."
        )
    return None


def _try_to_read(
    folder: Path, targets: Mapping[str, Any], check: Check | None
) -> tuple[Metadata | None, dict[str, np.ndarray], str]:
    """A checkpoint, and what is wrong with it; one of both is empty."""
    try:
        if not folder.is_dir():
            raise CheckpointError(
                f"process {jax.process_index()} does not see {folder}: all processes "
                "need the same workdir, on a file system that they share."
            )
        metadata = read_metadata(folder)
        if lines := mismatches(metadata.arrays, targets):
            raise CheckpointError(
                f"checkpoint {folder} is of another network: {listing(lines)}. Give "
                "the configuration that it was trained with, or another workdir."
            )
        if check is not None and (difference := check(metadata)):
            raise CheckpointError(f"checkpoint {folder} {difference}")
        return metadata, read_arrays(folder, metadata), ""
    except DamagedError as error:
        return None, {}, f"{_DAMAGED}{error}"
    except CheckpointError as error:
        return None, {}, str(error)


def _report(damaged: Mapping[Path, str], set_aside: bool) -> None:
    """Says what is passed over, and renames it if asked to."""
    for folder, reason in damaged.items():
        aside = _free_name(folder)
        kept = f", is now {aside.name}," if set_aside else ""
        if set_aside:
            try:
                folder.rename(aside)
            except OSError as error:
                raise CheckpointError(
                    f"checkpoint {folder} is damaged ({reason}), and cannot be renamed "
                    f"({error.strerror}); move it away."
                ) from None
        print_once(f"Checkpoint {folder} is damaged ({reason}){kept} and left out.")


def _agreed(message: str) -> CheckpointError:
    """An error that all processes have come to."""
    error = CheckpointError(message)
    error.add_note(KNOWN_TO_ALL)
    return error


def _free_name(folder: Path) -> Path:
    aside = folder.with_name(f"{folder.name}.damaged")
    count = 1
    while aside.exists():
        count += 1
        aside = folder.with_name(f"{folder.name}.damaged-{count}")
    return aside


def _split(states: Mapping[str, TrainState]) -> dict[str, dict[str, Any]]:
    return {
        item: {name: getattr(state, item) for name, state in states.items()}
        for item in ARRAY_ITEMS
    }


def _on_host(name: str, leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and not (
        leaf.is_fully_addressable or leaf.is_fully_replicated
    ):
        raise CheckpointError(
            f"{name} is divided over processes ({leaf.sharding}): expected arrays that "
            "every process has the whole of; replicate it before it is saved."
        )
    return np.asarray(leaf)


def _place(array: np.ndarray, like: Any) -> Any:
    if not isinstance(like, jax.Array):
        return array
    return jax.make_array_from_callback(
        array.shape, like.sharding, lambda index: array[index]
    )
