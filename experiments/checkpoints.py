"""Checkpoints: written whole or not at all, and checked when they are read."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import google_crc32c
import jax
import numpy as np
import orbax.checkpoint as ocp

from experiments.training import TrainState
from experiments.workdir import WorkdirError

# What a checkpoint holds apart, so that each can be restored without the others.
ARRAY_ITEMS = TrainState._fields


class CheckpointError(WorkdirError):
    """A checkpoint cannot be read or written."""


class Checkpoints:
    """The checkpoints of one run, in one folder, one subfolder a step.

    Orbax writes them in the background and keeps the newest. Beside the arrays lies a
    checksum of each: Orbax does not notice a flipped bit.
    """

    def __init__(self, directory: Path, max_to_keep: int = 2) -> None:
        """Opens the folder, which need not exist yet."""
        self._directory = directory.absolute()
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(max_to_keep=max_to_keep),
        )

    def save(self, step: int, states: Mapping[str, TrainState]) -> None:
        """Starts saving; the arrays may be overwritten as soon as this returns.

        Args:
          step: steps done.
          states: a state a network.
        """
        items = _split(states)
        metadata = {"step": step, "checksums": _checksums(items)}
        arrays = {name: ocp.args.StandardSave(items[name]) for name in ARRAY_ITEMS}
        with self._writing():
            saved = self._manager.save(
                step,
                args=ocp.args.Composite(metadata=ocp.args.JsonSave(metadata), **arrays),
            )
        if not saved:
            raise CheckpointError(
                f"no checkpoint was written for step {step}: {self._directory} has it, "
                "or a newer one, already; use another workdir."
            )

    def restore_newest(
        self, like: Mapping[str, TrainState]
    ) -> tuple[int, dict[str, TrainState]] | None:
        """Restores the newest checkpoint, or returns None if there is none.

        Args:
          like: states of the same structure, shapes and placement on devices.

        Returns:
          The number of steps done and the states.

        Raises:
          CheckpointError: the newest checkpoint is damaged or of another network.
        """
        steps = sorted(self._manager.all_steps())
        if not steps:
            return None
        step = steps[-1]
        try:
            return step, self._restore(step, like)
        # Orbax and what it builds on raise whatever the damage happens to break.
        except Exception as error:
            before = f"step {steps[-2]}" if len(steps) > 1 else "the start"
            raise CheckpointError(
                f"checkpoint {self._directory / str(step)} is damaged, or of another "
                f"network ({_cause(error)}); move or delete that folder to go on from "
                f"{before}."
            ) from error

    def close(self) -> None:
        """Waits, and releases the folder."""
        with self._writing():
            self._manager.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        # What the background thread raises, a full disk mostly, comes up anywhere here.
        try:
            yield
        except Exception as error:
            raise CheckpointError(
                f"cannot write a checkpoint to {self._directory} ({_cause(error)}); "
                "after a remedy the same command goes on from the one before."
            ) from error

    def _restore(
        self, step: int, like: Mapping[str, TrainState]
    ) -> dict[str, TrainState]:
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _split(like))
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                metadata=ocp.args.JsonRestore(),
                **{
                    name: ocp.args.StandardRestore(abstract[name])
                    for name in ARRAY_ITEMS
                },
            ),
        )
        items = {name: restored[name] for name in ARRAY_ITEMS}
        expected = restored["metadata"]["checksums"]
        found = _checksums(items)
        wrong = sorted(
            path
            for path in expected.keys() | found.keys()
            if expected.get(path) != found.get(path)
        )
        if wrong:
            raise CheckpointError(
                f"{len(wrong)} of {len(expected)} arrays differ from their checksums, "
                f"the first is {wrong[0]}"
            )
        return {
            name: TrainState(**{item: items[item][name] for item in ARRAY_ITEMS})
            for name in like
        }


def _split(states: Mapping[str, TrainState]) -> dict[str, dict[str, Any]]:
    return {
        item: {name: getattr(state, item) for name, state in states.items()}
        for item in ARRAY_ITEMS
    }


def _cause(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _checksums(items: Mapping[str, Any]) -> dict[str, str]:
    """CRC-32C of every array, with its dtype and shape, by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(items))
    return {
        jax.tree_util.keystr(path): _checksum(np.asarray(leaf)) for path, leaf in leaves
    }


def _checksum(array: np.ndarray) -> str:
    crc = google_crc32c.value(array.tobytes())
    return json.dumps([str(array.dtype), list(array.shape), f"{crc:08x}"])
