import socket
import subprocess
import sys

import jax
import pytest

from experiments.configuration.fields import ConfigError
from experiments.distributed import processes
from experiments.distributed.processes import (
    Address,
    ProcessesError,
    in_every_process,
    in_first_process,
    is_first,
    is_known_to_all,
    start,
)
from tests.experiments.helpers import REPOSITORY, command_environment

NOWHERE = Address(None, None, None)


@pytest.mark.parametrize(
    ("mode", "address", "message"),
    [
        ("maybe", NOWHERE, "--distributed=maybe: expected one of auto, on, off"),
        ("on", Address("here:1", None, 0), "--num_processes: missing; give all of"),
        (
            "auto",
            Address(None, 2, None),
            "_address, --process_id: missing",
        ),
        ("off", Address("here:1", 2, 0), "--distributed=off goes without"),
        ("on", Address("here", 2, 0), "--coordinator_address=here: expected HOST:PORT"),
        ("on", Address(":12", 2, 0), "--coordinator_address=:12: expected HOST:PORT"),
        ("on", Address("here:99999", 2, 0), "expected HOST:PORT"),
        ("on", Address("here:1", 2, 2), "--process_id=2 with --num_processes=2"),
        ("on", Address("here:1", 2, -1), "--process_id=-1 with --num_processes=2"),
    ],
)
def test_an_address_that_makes_no_sense(mode, address, message):
    with pytest.raises(ConfigError, match=message):
        start(mode, address)
    assert not jax.distributed.is_initialized()


@pytest.mark.parametrize("mode", ["auto", "off"])
def test_a_process_alone(mode, monkeypatch):
    # As before anything was asked of JAX, which refuses later calls.
    def initialize(*arguments, **_):
        assert mode == "auto"
        assert arguments == (None, None, None)
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    start(mode, NOWHERE)
    assert not processes.are_several()
    assert is_first()


def test_no_others_where_there_should_be(monkeypatch):
    def initialize(*_, **__):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(ProcessesError, match=r"cannot be connected .*--distributed"):
        start("on", NOWHERE)


@pytest.mark.parametrize(
    ("host", "given", "expected"),
    [
        ("localhost", (None, None), (30, 20)),
        ("127.0.0.1", (None, None), (30, 20)),
        ("10.0.0.7", (None, None), (300, 100)),
        ("10.0.0.7", (7, 8), (7, 8)),
    ],
)
def test_patience(host, given, expected, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(
        jax.distributed, "initialize", lambda *_, **options: calls.append(options)
    )
    start("auto", Address(f"{host}:1234", 2, 1), *given)
    ((wait, silence, shutdown),) = [
        (
            call["initialization_timeout"],
            call["heartbeat_timeout_seconds"],
            call["shutdown_timeout_seconds"],
        )
        for call in calls
    ]
    assert (wait, silence) == expected
    assert shutdown == silence
    expected_line = f"Process 1 of 2 waits up to {wait} s (--start_seconds)"
    assert expected_line in capsys.readouterr().out


@pytest.mark.parametrize(
    ("host", "process", "resolved", "bound"),
    [
        ("localhost", 0, "127.0.0.1", True),
        ("127.0.0.1", 0, "127.0.0.1", True),
        ("localhost", 1, "127.0.0.1", False),  # it listens nowhere
        ("node0", 0, "127.0.1.1", False),  # as Debian has its own name
        ("balancer", 0, "192.0.2.1", False),  # of no machine
    ],
)
def test_process_0_listens_at_the_address_given_if_it_has_it(
    host, process, resolved, bound, monkeypatch, capsys
):
    monkeypatch.delenv("JAX_COORDINATOR_BIND_ADDRESS", raising=False)
    place = (socket.AF_INET, socket.SOCK_STREAM, 0, "", (resolved, 0))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [place])
    calls = []
    monkeypatch.setattr(
        jax.distributed, "initialize", lambda *_, **options: calls.append(options)
    )
    address = f"{host}:1234"
    start("on", Address(address, 2, process))
    assert calls[0]["coordinator_bind_address"] == (address if bound else None)
    everywhere = f"No address of this machine is {host}" in capsys.readouterr().out
    assert everywhere == (process == 0 and not bound)


def test_a_variable_says_where_process_0_listens(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_BIND_ADDRESS", "0.0.0.0:1")
    calls = []
    monkeypatch.setattr(
        jax.distributed, "initialize", lambda *_, **options: calls.append(options)
    )
    start("on", Address("localhost:1234", 2, 0))
    assert calls[0]["coordinator_bind_address"] is None


def test_alone_together_is_a_call():
    assert in_every_process(lambda: 3) == 3
    with pytest.raises(KeyError) as caught:
        in_every_process(lambda: {}["absent"])
    assert not is_known_to_all(caught.value)
    done = []
    in_first_process(lambda: done.append(1))
    assert done == [1]


def test_finding_out_who_is_first_takes_no_device():
    code = (
        "import jax; from experiments.distributed import processes, progress; "
        "assert processes.is_first(); progress.progress_bar(1, 0, 'step').close(); "
        "from jax.extend import backend; import jax._src.xla_bridge as bridge; "
        "assert not bridge.backends_are_initialized()"
    )
    subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env=command_environment(),
        check=True,
        capture_output=True,
    )
