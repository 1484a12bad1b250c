"""Trained networks in one file, for other tools: plain arrays, or StableHLO."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

import numpy as np

from experiments.checkpoints.folders import choose_checkpoint
from experiments.checkpoints.load import load_variables
from experiments.checkpoints.stored import (
    Metadata,
    damage_named,
    named_leaves,
    read_metadata,
)
from experiments.configuration.fields import ConfigError
from experiments.running.new_files import whole_file
from experiments.running.workdir import WorkdirError

PROGRAM = ".stablehlo"


def export(
    folder: Path,
    step: int | str,
    output: str | None,
    network: str | None,
    fold: bool,
    replica: int = 0,
) -> None:
    """Writes a network, or parameters and statistics by name, and says what.

    Args:
      folder: as for `choose_checkpoint`.
      step: as for `choose_checkpoint`.
      output: the file, whose ending is `PROGRAM` or a key of `WRITERS`.
      network: the one to export; None for all. With several, names have that of the
        network after the collection's, as in the checkpoint.
      fold: fold normalisations into the layers before them, and say which.
      replica: which of the networks that were trained side by side a program computes;
        arrays are those of all.

    Raises:
      CheckpointError: there is no such checkpoint, network or replica, or it is
        damaged.
      ConfigError: the file's name or the network does not serve.
      WorkdirError: the file cannot be written.
    """
    path = Path(output or "")
    if path.suffix not in (endings := (*WRITERS, PROGRAM)):
        raise ConfigError(
            f"--output={output}: expected a file that ends with "
            f"{', '.join(endings[:-1])} or {endings[-1]}."
        )
    checkpoint = choose_checkpoint(folder, step)
    with damage_named(checkpoint):
        metadata = read_metadata(checkpoint)
    if path.suffix == PROGRAM:
        write, content = _program(checkpoint, metadata, network, fold, replica)
    else:
        write, content = _arrays(path, checkpoint, metadata, network, fold)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            write(file)
    except OSError as error:
        raise WorkdirError(f"cannot write {path} ({error.strerror}).") from None
    print(f"{path}: {content}, of {checkpoint}.")


def _program(
    checkpoint: Path, metadata: Metadata, network: str | None, fold: bool, replica: int
) -> tuple[Callable[[IO[bytes]], object], str]:
    """How to write a network's program, and what it is in words."""
    # Imported here: the networks take a while.
    from experiments.checkpoints.stablehlo import PLATFORMS, serialise

    variables = load_variables(checkpoint, network=network)
    content = serialise(metadata.config, variables, replica, fold)
    words = f"a program for {', '.join(PLATFORMS)}, {len(content):,} bytes"
    return lambda file: file.write(content), words


def _arrays(
    path: Path, checkpoint: Path, metadata: Metadata, network: str | None, fold: bool
) -> tuple[Callable[[IO[bytes]], object], str]:
    """How to write networks' arrays, and what they are in words."""
    arrays: dict[str, np.ndarray] = {}
    for name in [network] if network else metadata.networks:
        variables = load_variables(checkpoint, network=name)
        if fold:
            # Imported here: the networks take a while.
            from experiments.checkpoints.folded_network import fold_variables

            variables = fold_variables(metadata.config, name, variables)
        inserted = "" if len(metadata.networks) == 1 or network else f"{name}/"
        for leaf_name, leaf in named_leaves(variables).items():
            collection, _, rest = leaf_name.partition("/")
            arrays[f"{collection}/{inserted}{rest}"] = _widened(np.asarray(leaf))
    size = sum(array.nbytes for array in arrays.values())
    writer = WRITERS[path.suffix]
    return (
        lambda file: writer(file, arrays, {"checkpoint": str(checkpoint)}),
        f"{len(arrays)} arrays, {size:,} bytes",
    )


def _widened(array: np.ndarray) -> np.ndarray:
    """The same values in a type that NumPy itself knows."""
    return array if array.dtype.isbuiltin == 1 else array.astype(np.float32)


def _write_npz(
    file: IO[bytes], arrays: Mapping[str, np.ndarray], notes: Mapping[str, str]
) -> None:
    np.savez(file, allow_pickle=False, **arrays)


def _write_safetensors(
    file: IO[bytes], arrays: Mapping[str, np.ndarray], notes: Mapping[str, str]
) -> None:
    try:
        from safetensors.numpy import save
    except ImportError:
        raise ConfigError(
            "--output=FILE.safetensors: the package safetensors is not installed; "
            "`pip install safetensors`, or export to .npz."
        ) from None
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    file.write(save(contiguous, metadata=dict(notes)))


WRITERS: Mapping[str, Callable[..., None]] = {
    ".npz": _write_npz,
    ".safetensors": _write_safetensors,
}
