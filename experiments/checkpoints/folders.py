"""Finding checkpoints in what a run leaves."""

from collections.abc import Sequence
from pathlib import Path

from experiments.checkpoints.stored import (
    ARRAY_ITEMS,
    METADATA_ITEM,
    CheckpointError,
    best_step,
    read_score,
    stored_steps,
)

NEWEST, BEST = "newest", "best"


def find_checkpoints(folder: Path) -> list[Path]:
    """Folders of single checkpoints, in the order of their steps.

    Args:
      folder: a run's workdir, a folder of checkpoints there, or one of them.

    Raises:
      CheckpointError: there is none.
    """
    if any((folder / item).is_dir() for item in (METADATA_ITEM, *ARRAY_ITEMS)):
        return [folder]
    below = sorted(folder.iterdir()) if folder.is_dir() else []
    folders = [folder, *(place for place in below if place.is_dir())]
    found = [place / str(step) for place in folders for step in stored_steps(place)]
    if not found:
        raise CheckpointError(
            f"{folder} holds no checkpoint: expected a run's workdir, a folder of "
            "checkpoints in it, or one of them."
        )
    return found


def choose_checkpoint(folder: Path, step: int | str = NEWEST) -> Path:
    """The folder of one checkpoint.

    Args:
      folder: as for `find_checkpoints`; all checkpoints there must lie side by side.
      step: `NEWEST`, `BEST` (by score), or a number of steps done.

    Raises:
      CheckpointError: there is none, or it is not clear which one.
    """
    found = find_checkpoints(folder)
    if found == [folder]:
        return folder
    places = sorted({checkpoint.parent for checkpoint in found})
    if len(places) > 1:
        raise CheckpointError(
            f"{folder} holds checkpoints of several kinds: give one of "
            f"{', '.join(map(str, places))}."
        )
    if step == NEWEST:
        return found[-1]
    wanted = _best(found) if step == BEST else str(step)
    for checkpoint in found:
        if checkpoint.name == wanted:
            return checkpoint
    raise CheckpointError(
        f"{places[0]} has no checkpoint of step {step}: expected {NEWEST}, {BEST} "
        f"(where scores are known), or one of "
        f"{', '.join(checkpoint.name for checkpoint in found)}."
    )


def _best(checkpoints: Sequence[Path]) -> str:
    scores = {int(path.name): read_score(path) for path in checkpoints}
    return str(best_step(scores))
