"""Reads what torch.save wrote, without torch and without executing any of it.

A pickle names functions to call. Here a name that is not in `GLOBALS` is an error, and
what is in it are stand-ins that describe tensors: nothing is ever imported.

Since torch 1.6 a file is a zip archive: the pickle, and each storage in a file of its
own. Before, it was several pickles after each other, then the storages.
"""

import collections
import io
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from experiments.weights.errors import WeightsError

MAGIC_NUMBER = 0x1950A86A20F9469CFC6C  # the first pickle of a file of the old form
# What the state of a network may lie under in a training checkpoint.
STATE_KEYS = ("state_dict", "model_state_dict", "model", "net")
DTYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}


class _Tensor(NamedTuple):
    """A part of a storage, in elements."""

    storage: "_Storage"
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Storage(NamedTuple):
    key: str
    dtype: str


class _Type(NamedTuple):
    """Stands for a class of storages, whose name is all that is needed."""

    dtype: str


class _Tensors:
    """Makes a `_Tensor` of the first arguments of torch's functions."""

    __slots__ = ()  # a pickle can set no attribute

    def __call__(
        self, storage: _Storage, offset: int, shape: Any, strides: Any, *_: Any
    ) -> _Tensor:
        return _Tensor(storage, offset, tuple(shape), tuple(strides))


class _Parameters:
    """Makes of a parameter the tensor that it is."""

    __slots__ = ()

    def __call__(self, tensor: _Tensor, *_: Any) -> _Tensor:
        return tensor


# All that a pickle may name. Calling any of it makes a dict or a description.
GLOBALS: Mapping[str, Any] = {
    "collections.OrderedDict": collections.OrderedDict,
    "torch._utils._rebuild_tensor": _Tensors(),
    "torch._utils._rebuild_tensor_v2": _Tensors(),
    "torch._utils._rebuild_parameter": _Parameters(),
    **{f"torch.{name}": _Type(dtype) for name, dtype in DTYPES.items()},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return GLOBALS[f"{module}.{name}"]
        except KeyError:
            raise WeightsError(
                f"it names {module}.{name}, which no weights need and which is not "
                "executed; expected a dict of tensors: in torch, save "
                "model.state_dict()."
            ) from None

    def persistent_load(self, reference: Any) -> _Storage:
        kind, storage_type, key, *_ = reference
        if kind != "storage" or not isinstance(storage_type, _Type):
            raise WeightsError(f"it refers to {kind}, expected storages of numbers.")
        return _Storage(str(key), storage_type.dtype)


def read(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a state dict, by name; others' names are joined by dots.

    Raises:
      WeightsError: it holds anything else.
    """
    with path.open("rb") as file:
        if zipfile.is_zipfile(file):
            state, storages = _read_archive(file)
        else:
            state, storages = _read_pickles(file)
    return {
        name: _array(tensor, storages) for name, tensor in _named_tensors(state).items()
    }


def _read_archive(file: IO[bytes]) -> tuple[Any, dict[str, bytes]]:
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        (pickled,) = (name for name in names if name.endswith("/data.pkl"))
        folder = pickled.removesuffix("data.pkl")
        if f"{folder}byteorder" in names:
            _check_order(archive.read(f"{folder}byteorder") == b"little")
        state = _Unpickler(io.BytesIO(archive.read(pickled))).load()
        storages = {
            name.removeprefix(f"{folder}data/"): archive.read(name)
            for name in names
            if name.startswith(f"{folder}data/")
        }
    return state, storages


def _read_pickles(file: IO[bytes]) -> tuple[Any, dict[str, bytes]]:
    file.seek(0)
    # Magic number, version of the form, and the machine that wrote it.
    magic, _, machine = (_Unpickler(file).load() for _ in range(3))
    if magic != MAGIC_NUMBER:
        raise WeightsError("it is neither a zip archive nor an older file of torch.")
    _check_order(machine["little_endian"])
    state = _Unpickler(file).load()
    keys = _Unpickler(file).load()
    sizes = {
        tensor.storage.key: np.dtype(jnp.dtype(tensor.storage.dtype)).itemsize
        for tensor in _named_tensors(state).values()
    }
    storages = {}
    for key in keys:
        (count,) = struct.unpack("<q", file.read(8))
        if key not in sizes:
            raise WeightsError(f"no tensor is of its storage {key}.")
        storages[key] = file.read(count * sizes[key])
    return state, storages


def _check_order(little: bool) -> None:
    if not little:
        raise WeightsError("its bytes are in big-endian order, expected little.")


def _named_tensors(state: Any) -> dict[str, _Tensor]:
    """The tensors of a state dict, or of the one within a training checkpoint."""
    for key in STATE_KEYS:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    tensors = dict(state) if isinstance(state, dict) else {}
    wrong = [
        f"{name} ({type(value).__name__})"
        for name, value in tensors.items()
        if not isinstance(value, _Tensor)
    ]
    if wrong or not tensors:
        raise WeightsError(
            f"expected a dict of tensors, got {type(state).__name__}"
            + (f" with {', '.join(wrong[:4])}" if wrong else "")
            + "; in torch, save model.state_dict()."
        )
    return tensors


def _array(tensor: _Tensor, storages: Mapping[str, bytes]) -> np.ndarray:
    dtype = jnp.dtype(tensor.storage.dtype)
    values = np.frombuffer(storages[tensor.storage.key], dtype)
    _, offset, shape, strides = tensor
    last = offset + sum(
        (size - 1) * stride for size, stride in zip(shape, strides, strict=True)
    )
    # Beyond the storage lies memory of others.
    if min((offset, *shape, *strides)) < 0 or (0 not in shape and last >= len(values)):
        raise WeightsError(f"a tensor of shape {shape} lies outside its storage.")
    view = np.lib.stride_tricks.as_strided(
        values[offset:], shape, [stride * dtype.itemsize for stride in strides]
    )
    return view.copy()
