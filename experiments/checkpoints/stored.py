"""One checkpoint on disk: what it says about itself, and its arrays, checked.

Everything here reads into host memory, needs neither the network nor its devices, and
waits for no other process.
"""

import contextlib
import errno
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import jax
import numpy as np
import orbax.checkpoint as ocp

from experiments.checkpoints.orbax_messages import silence_leftovers
from experiments.running import sealed
from experiments.running.metrics import Kept
from experiments.running.workdir import WorkdirError
from experiments.training.state import TrainState

# 1 lacks `rows` and `losses`.
FORMATS = 1, 2
# What a checkpoint holds apart, so that each can be read without the others.
ARRAY_ITEMS = TrainState._fields
METADATA_ITEM = "metadata"


class CheckpointError(WorkdirError):
    """A checkpoint cannot be read or written."""


class DamagedError(CheckpointError):
    """A checkpoint is not what was written."""


class ArrayRecord(NamedTuple):
    """What is known of an array beside its values."""

    shape: tuple[int, ...]
    dtype: str
    crc32c: str  # of its bytes in C order, hexadecimal

    @property
    def nbytes(self) -> int:
        """Size of the values."""
        return int(np.prod(self.shape)) * jax.numpy.dtype(self.dtype).itemsize


class Metadata(NamedTuple):
    """What a checkpoint says about itself.

    A batch follows from the run's seed and the step: `step` is the position in the
    data, too.
    """

    step: int  # steps done
    score: float | None  # higher is better; None if it was not measured
    config: dict[str, Any]  # of the run
    provenance: dict[str, Any]  # as `experiments.running.provenance` describes it
    arrays: dict[str, ArrayRecord]  # by name, as "params/network/conv1/kernel"
    # The rows of each log up to here; None if the checkpoint knows of none.
    rows: dict[str, Kept] | None = None
    # Where the evaluation of this step is still to be made: what it is to report.
    losses: dict[str, Any] | None = None

    @property
    def networks(self) -> list[str]:
        """Names of the networks whose states the checkpoint holds."""
        return sorted({name.split("/")[1] for name in self.arrays})


def stored_steps(directory: Path) -> list[int]:
    """Steps of the checkpoints in a folder, which need not exist; increasing.

    Raises:
      CheckpointError: the folder, or one of its entries with a step's name, is none
        that can be read. Orbax would take it for a checkpoint, or for none at all.
    """
    if not os.path.lexists(directory):
        return []
    steps = []
    for entry in _entries(directory):
        if not entry.name.isdecimal():
            continue
        if str(int(entry.name)) != entry.name:
            raise CheckpointError(
                f"{entry} has the name of no checkpoint: expected that of step "
                f"{int(entry.name)} to be {int(entry.name)}; rename it or move it away."
            )
        _entries(entry)
        steps.append(int(entry.name))
    return sorted(steps)


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise CheckpointError(
            f"{folder} is no folder that can be read ({error.strerror}): expected one, "
            "on a disk that is there; make it so, or move it away."
        ) from None


def best_step(scores: Mapping[int, float | None]) -> int | None:
    """The step with the highest score, the first of equals; None without any score."""
    known = [step for step in sorted(scores) if scores[step] is not None]
    return max(known, key=lambda step: scores[step] or 0.0, default=None)


def named_leaves(items: Any) -> dict[str, Any]:
    """Leaves of a tree by name: keys, indices and fields, joined by slashes."""
    leaves = jax.tree_util.tree_leaves_with_path(items)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in leaves
    }


def record_of(array: np.ndarray) -> ArrayRecord:
    """What the metadata says of an array."""
    content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    crc = google_crc32c.value(content)
    return ArrayRecord(array.shape, str(array.dtype), f"{crc:08x}")


def encode(metadata: Metadata) -> dict[str, Any]:
    """Metadata as JSON values, with a checksum of their own."""
    return sealed.seal({"format": FORMATS[-1], **metadata._asdict()})


def read_metadata(folder: Path) -> Metadata:
    """Reads what a checkpoint says about itself.

    Args:
      folder: of one step.

    Raises:
      DamagedError: it cannot be parsed, or is not what was written.
      CheckpointError: it is of another format, or cannot be read.
    """
    with _as_damage(folder / METADATA_ITEM):
        content = ocp.JsonCheckpointHandler().restore(folder / METADATA_ITEM)
        # Another format may have its checksum elsewhere.
        if content.get("format") in FORMATS and sealed.CHECKSUM not in content:
            raise DamagedError("metadata has no checksum")
        content = sealed.unseal(content)
    if content.get("format") not in FORMATS:
        raise CheckpointError(
            f"{folder} has checkpoint format {content.get('format', 0)}: this version "
            f"reads formats {' and '.join(map(str, FORMATS))}; use the version that "
            "wrote it, or another workdir."
        )
    fields = {field: content[field] for field in Metadata._fields if field in content}
    if folder.name.isdecimal() and int(folder.name) != fields["step"]:
        raise DamagedError(f"it is the checkpoint of step {fields['step']}")
    arrays = {
        name: ArrayRecord(tuple(shape), dtype, crc)
        for name, (shape, dtype, crc) in fields.pop("arrays").items()
    }
    if fields.get("rows") is not None:
        fields["rows"] = {name: Kept(*kept) for name, kept in fields["rows"].items()}
    return Metadata(**fields, arrays=arrays)


def read_arrays(
    folder: Path, metadata: Metadata, items: Collection[str] = ARRAY_ITEMS
) -> dict[str, np.ndarray]:
    """Reads arrays, and compares every one with its checksum.

    Args:
      folder: of one step.
      metadata: of the same.
      items: of `ARRAY_ITEMS`, those to be read.

    Returns:
      The arrays by the names that the metadata has for them.

    Raises:
      DamagedError: one is missing, or not what was written.
    """
    found: dict[str, np.ndarray] = {}
    for item in items:
        with _as_damage(folder / item):
            found |= named_leaves({item: _read_item(folder.absolute() / item)})
    expected = {
        name: record
        for name, record in metadata.arrays.items()
        if name.split("/")[0] in items
    }
    records = {name: record_of(array) for name, array in found.items()}
    wrong = sorted(
        name
        for name in expected.keys() | records.keys()
        if expected.get(name) != records.get(name)
    )
    if wrong:
        raise DamagedError(
            f"{len(wrong)} of {len(expected)} arrays differ from their checksums, "
            f"the first is {wrong[0]}"
        )
    return found


def read_score(folder: Path) -> float | None:
    """A checkpoint's score; None if it has none, or is damaged."""
    try:
        return read_metadata(folder).score
    except CheckpointError:
        return None


@contextlib.contextmanager
def damage_named(folder: Path) -> Iterator[None]:
    """Turns damage that is found inside into an error for the user."""
    try:
        yield
    except DamagedError as error:
        raise CheckpointError(
            f"checkpoint {folder} is damaged ({error}); choose another step."
        ) from error


def mismatches(
    stored: Mapping[str, ArrayRecord], expected: Mapping[str, Any]
) -> list[str]:
    """How stored arrays differ from those of a network, a line a leaf.

    Args:
      stored: by name.
      expected: by name; anything with a shape and a dtype.
    """
    lines = [f"missing: {name}" for name in sorted(expected.keys() - stored.keys())]
    lines += [f"extra: {name}" for name in sorted(stored.keys() - expected.keys())]
    for name in sorted(stored.keys() & expected.keys()):
        record, leaf = stored[name], expected[name]
        if record.shape != leaf.shape:
            lines.append(f"shape of {name}: {record.shape} there, {leaf.shape} here")
        if record.dtype != str(leaf.dtype):
            lines.append(f"dtype of {name}: {record.dtype} there, {leaf.dtype} here")
    return lines


def listing(lines: Sequence[str], most: int = 8) -> str:
    """Lines as one, without the last ones of many."""
    more = [f"and {len(lines) - most} more"] if len(lines) > most else []
    return "; ".join([*lines[:most], *more])


def cause_of(error: Exception) -> str:
    """An error's message as one short line: what was tried, and why it failed."""
    text = " ".join(str(error).split()) or repr(error)
    return text if len(text) <= 240 else f"{text[:80]} ... {text[-155:]}"


@contextlib.contextmanager
def _as_damage(item: Path) -> Iterator[None]:
    # Orbax and what it builds on raise whatever the damage happens to break.
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        reason = _fault_of_the_system(error, item)
        if reason is not None:
            raise CheckpointError(
                f"{item} cannot be read ({reason}); nothing was changed, and after a "
                "remedy the same command goes on."
            ) from error
        raise DamagedError(f"{item.name} cannot be read: {cause_of(error)}") from error


def _fault_of_the_system(error: BaseException | None, item: Path) -> str | None:
    """What the system could not do; None if an error has other causes.

    A file that is missing, in a checkpoint that is there, is damage.
    """
    while error is not None:
        if isinstance(error, MemoryError):
            return "there is not enough memory"
        # TensorStore has its own words for errors of the system.
        named = re.search(r"os_error_code='(\d+)'", str(error))
        number = int(named[1]) if named else getattr(error, "errno", None)
        if number is not None and number not in _MISSING:
            return os.strerror(number)
        error = error.__cause__ or error.__context__
    try:
        for path in item.rglob("*"):
            # A pipe would be waited for.
            if not (path.is_dir() or path.is_fifo()):
                path.read_bytes()
    except OSError as failure:
        return None if failure.errno in _MISSING else failure.strerror
    return None


_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)


def _read_item(path: Path) -> Any:
    silence_leftovers()
    # A checkpointer, the layer above, would wait for other processes.
    handler = ocp.PyTreeCheckpointHandler()
    as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
    restore_args = jax.tree.map(lambda _: as_numpy, handler.metadata(path).tree)
    return handler.restore(path, args=ocp.args.PyTreeRestore(restore_args=restore_args))
