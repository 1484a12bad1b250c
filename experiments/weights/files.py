"""Reads the files that weights are published in, and executes nothing in them."""

import json
import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from experiments.weights import tensorflow_file, torch_file
from experiments.weights.errors import WeightsError

Arrays = dict[str, np.ndarray]

# safetensors' names of types.
SAFETENSORS_DTYPES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"},
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8"},
    "BOOL": "bool",
}


def read_weights(path: str | Path) -> Arrays:
    """Reads all arrays of a file, by the names that they have there.

    Args:
      path: ends with a key of `READERS`; or is a TensorFlow checkpoint, whose files'
        names begin so.

    Raises:
      WeightsError: there is no such file, or it is not what its name says.
    """
    path = Path(path)
    reader = READERS.get(path.suffix)
    if reader is None and tensorflow_file.index_of(path) is not None:
        reader = tensorflow_file.read
    if reader is None:
        raise WeightsError(
            f"{path}: expected a file that ends with one of {', '.join(READERS)}, or "
            "the name of a TensorFlow checkpoint."
        )
    try:
        return reader(path)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    except OSError as error:
        raise WeightsError(f"cannot read {path} ({error.strerror}).") from None
    # Whatever a damaged file happens to break.
    except Exception as error:
        raise WeightsError(
            f"{path} is damaged, or no {path.suffix or 'checkpoint'} file "
            f"({type(error).__name__}: {error}); fetch it again."
        ) from error


def _read_npz(path: Path) -> Arrays:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def _read_safetensors(path: Path) -> Arrays:
    content = path.read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + length])
    arrays = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        first, end = (8 + length + offset for offset in entry["data_offsets"])
        dtype = jnp.dtype(SAFETENSORS_DTYPES[entry["dtype"]])
        if end > len(content) or end - first != (
            math.prod(entry["shape"]) * dtype.itemsize
        ):
            raise WeightsError(f"the place of {name} in it makes no sense.")
        values = np.frombuffer(content[first:end], dtype)
        arrays[name] = values.reshape(entry["shape"])
    return arrays


READERS: Mapping[str, Callable[[Path], Arrays]] = {
    ".safetensors": _read_safetensors,
    ".npz": _read_npz,
    ".pth": torch_file.read,
    ".pt": torch_file.read,
    ".bin": torch_file.read,
    ".ckpt": tensorflow_file.read,
    ".index": tensorflow_file.read,
}
