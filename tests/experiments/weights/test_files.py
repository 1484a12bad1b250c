"""Readers of published files, against torch, safetensors and TensorFlow themselves."""

import contextlib
import io
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from experiments.weights import torch_file
from experiments.weights.errors import WeightsError
from experiments.weights.files import read_weights
from tests.experiments.weights.make_stored import values

STORED = Path(__file__).parent / "stored"


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("name", ["older.ckpt", "newer.ckpt", "newer.ckpt.index"])
def test_checkpoints_of_tensorflow(name):
    assert_same(read_weights(STORED / name), values())


def test_a_damaged_checkpoint_of_tensorflow_is_noticed(tmp_path):
    for file in STORED.iterdir():
        content = bytearray(file.read_bytes())
        content[len(content) // 3] ^= 1
        for other in STORED.iterdir():
            (tmp_path / other.name).write_bytes(other.read_bytes())
        (tmp_path / file.name).write_bytes(content)
        name = "older.ckpt" if file.name.startswith("older") else "newer.ckpt"
        with pytest.raises(WeightsError, match="differs from its checksum"):
            read_weights(tmp_path / name)


def torch_state(torch):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    state = network.state_dict()
    state["transposed"] = torch.randn(3, 4).T
    state["part"] = torch.randn(10)[2:7:2]
    state["parameter"] = torch.nn.Parameter(torch.randn(2))
    state["half"] = torch.randn(3).half()
    state["empty"] = torch.zeros(0, 3)
    return state


@pytest.mark.parametrize("form", ["archive", "pickles"])
@pytest.mark.parametrize("key", [None, "state_dict"])
def test_files_of_torch(tmp_path, form, key):
    torch = pytest.importorskip("torch", reason="torch comes with the extra `peers`")
    state = torch_state(torch)
    path = tmp_path / "state.pth"
    torch.save(
        {key: state} if key else state,
        path,
        _use_new_zipfile_serialization=form == "archive",
    )
    expected = {name: tensor.detach().numpy() for name, tensor in state.items()}
    assert_same(read_weights(path), expected)


@pytest.mark.parametrize("form", ["archive", "pickles"])
def test_a_damaged_file_of_torch_gives_arrays_or_an_error(tmp_path, form):
    torch = pytest.importorskip("torch", reason="torch comes with the extra `peers`")
    buffer = io.BytesIO()
    archive = form == "archive"
    torch.save(torch_state(torch), buffer, _use_new_zipfile_serialization=archive)
    random = np.random.default_rng(0)
    path = tmp_path / "state.pth"
    for _ in range(100):
        content = bytearray(buffer.getvalue())
        content[random.integers(len(content))] ^= 1 << random.integers(8)
        path.write_bytes(content)
        with contextlib.suppress(WeightsError):
            assert all(isinstance(a, np.ndarray) for a in read_weights(path).values())


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


HARMFUL = {
    "eval": pickle.dumps(Calls(eval, "open('/tmp/executed', 'w')")),
    "nested": pickle.dumps({"a": [Calls(exec, "raise SystemExit")]}),
    "getattr": pickle.dumps(Calls(getattr, [], "append")),
    "old opcode": b"cos\nsystem\n(S'true'\ntR.",
    "instance": b"(S'true'\nios\nsystem\n.",
    "dotted": b"\x80\x04\x8c\x0bcollections\x8c\x0bOrderedDict.fromkeys\x93.",
    "of the file itself": b"cexperiments.weights.torch_file\nread\n.",
    # Attributes of what is allowed.
    "class": b"ccollections\nOrderedDict\n}S'a'\nI1\nsb.",
    "function": b"ctorch._utils\n_rebuild_tensor\n(N}S'a'\nI1\nstb.",
    "its class": b"ctorch._utils\n_rebuild_tensor\n(N}S'__class__'\nN" + b"stb.",
}


@pytest.mark.parametrize("pickled", HARMFUL.values(), ids=HARMFUL)
@pytest.mark.parametrize("form", ["archive", "pickles"])
def test_nothing_in_a_file_of_torch_is_executed(tmp_path, pickled, form):
    path = tmp_path / "state.pth"
    if form == "archive":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("state/data.pkl", pickled)
    else:
        machine = {"little_endian": True}
        head = (torch_file.MAGIC_NUMBER, 1001, machine)
        path.write_bytes(b"".join(map(pickle.dumps, head)) + pickled)
    with pytest.raises(WeightsError):
        read_weights(path)
    assert not Path("/tmp/executed").exists()


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        *((0, (5,), (1,)), (2, (3,), (1,)), (-1, (2,), (1,)), (3, (2,), (-1,))),
        *((0, (2, 3), (3, 1)), (0, (2**40,), (1,)), (5, (1,), (0,)), (0, (-1,), (1,))),
    ],
)
def test_tensors_outside_of_their_storage(tmp_path, offset, shape, strides):
    tensor = torch_file._Tensor(
        torch_file._Storage("0", "float32"), offset, shape, strides
    )
    with pytest.raises(WeightsError, match="outside its storage"):
        torch_file._array(tensor, {"0": bytes(16)})


def test_safetensors(tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    arrays = {
        name: np.ascontiguousarray(value)
        for name, value in values().items()
        if value.ndim
    }
    numpy.save_file(arrays, tmp_path / "a.safetensors", metadata={"format": "np"})
    assert_same(read_weights(tmp_path / "a.safetensors"), arrays)


def test_arrays_outside_of_a_file_of_safetensors(tmp_path):
    path = tmp_path / "a.safetensors"
    for first, end in ((0, 8), (-8, 0), (0, 3)):
        header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[%d,%d]}}' % (
            first,
            end,
        )
        path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
        with pytest.raises(WeightsError, match="makes no sense"):
            read_weights(path)


def test_npz(tmp_path):
    np.savez(tmp_path / "a.npz", **values())
    assert_same(read_weights(tmp_path / "a.npz"), values())
    np.savez(tmp_path / "b.npz", a=np.array([{}], dtype=object))
    with pytest.raises(WeightsError, match="allow_pickle=False"):
        read_weights(tmp_path / "b.npz")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.pth", None, "cannot read .*No such file"),
        ("none.ckpt", None, "no checkpoint of TensorFlow is there"),
        ("what.onnx", b"", "ends with one of .safetensors, .npz"),
        ("a.pth", b"<html>", "is damaged, or no .pth file"),
        ("a.npz", b"<html>", "is damaged, or no .npz file"),
        ("a.safetensors", b"<html> of more than eight bytes", "is damaged"),
        ("a.ckpt", b"<html>", "no checkpoint of TensorFlow"),
        ("a.pt", pickle.dumps(torch_file.MAGIC_NUMBER), "is damaged"),
    ],
)
def test_files_that_are_something_else(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=message) as error:
        read_weights(tmp_path / name)
    assert name in str(error.value)
