"""What is in checkpoints, and whether they are sound, for a terminal."""

import itertools
import json
from collections.abc import Iterable
from pathlib import Path

from experiments.checkpoints.folders import choose_checkpoint, find_checkpoints
from experiments.checkpoints.stored import (
    ARRAY_ITEMS,
    ArrayRecord,
    CheckpointError,
    DamagedError,
    Metadata,
    best_step,
    damage_named,
    listing,
    read_arrays,
    read_metadata,
)


def inspect(folder: Path, step: int | str) -> None:
    """Prints which checkpoints there are, and what one of each kind holds.

    Args:
      folder: as for `find_checkpoints`.
      step: as for `choose_checkpoint`; which one to print whole.

    Raises:
      CheckpointError: there is none, or one to be printed is damaged.
    """
    kinds = itertools.groupby(find_checkpoints(folder), lambda path: path.parent)
    for place, checkpoints in kinds:
        paths = list(checkpoints)
        if paths != [folder]:
            print(f"{place}:")
            _print_overview(paths)
        chosen = choose_checkpoint(folder if paths == [folder] else place, step)
        with damage_named(chosen):
            _print_content(chosen, read_metadata(chosen))


def verify(folder: Path) -> None:
    """Reads all checkpoints whole, and prints which are sound.

    Args:
      folder: as for `find_checkpoints`.

    Raises:
      CheckpointError: there is none, or one is damaged.
    """
    damaged = []
    checkpoints = find_checkpoints(folder)
    for path in checkpoints:
        try:
            metadata = read_metadata(path)
            found = read_arrays(path, metadata)
        except DamagedError as error:
            damaged.append(f"{path} ({error})")
            print(f"{path}: damaged, {error}")
        else:
            size = _size(metadata.arrays.values())
            print(f"{path}: sound, {len(found)} arrays, {size}")
    if damaged:
        raise CheckpointError(
            f"{len(damaged)} of {len(checkpoints)} checkpoints damaged: "
            f"{listing(damaged)}."
        )


def _print_overview(paths: list[Path]) -> None:
    scores: dict[int, float | None] = {}
    lines = {}
    for path in paths:
        step = int(path.name)
        try:
            metadata = read_metadata(path)
        except CheckpointError as error:
            lines[step] = str(error)
            continue
        scores[step] = metadata.score
        size = _size(metadata.arrays.values())
        lines[step] = f"{len(metadata.arrays)} arrays, {size}"
        if metadata.score is not None:
            lines[step] += f", score {metadata.score:g}"
    for step, line in lines.items():
        names = ["newest"] * (step == max(lines)) + ["best"] * (
            step == best_step(scores)
        )
        print("; ".join([f"  step {step:,}: {line}", *names]))


def _print_content(path: Path, metadata: Metadata) -> None:
    print(f"{path}:")
    print(f"  steps done, and so the position in the data: {metadata.step:,}")
    for title, values in (
        ("provenance", metadata.provenance),
        ("configuration", metadata.config),
    ):
        print(f"  {title}:")
        for key, value in values.items():
            print(f"    {key}: {json.dumps(value)}")
    for item in ARRAY_ITEMS:
        records = {
            name.partition("/")[2]: record
            for name, record in metadata.arrays.items()
            if name.split("/")[0] == item
        }
        print(f"  {item}: {len(records)} arrays, {_size(records.values())}")
        for name, record in records.items():
            size = f"{record.nbytes:,} bytes"
            print(f"    {name}: {record.dtype} {record.shape}, {size}")


def _size(records: Iterable[ArrayRecord]) -> str:
    return f"{sum(record.nbytes for record in records):,} bytes"
