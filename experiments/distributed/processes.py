"""Several processes that train together, each on the devices of its own machine."""

import contextlib
import ipaddress
import json
import os
import socket
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax

from experiments.configuration.fields import ConfigError
from experiments.distributed.agreement import first_message, text_of_first_process
from experiments.distributed.parallel import DeviceError
from experiments.distributed.patience import SILENCE_SECONDS, START_SECONDS

Result = TypeVar("Result")

MODES = ("auto", "on", "off")
# Marks an error that all processes have: each can end as if it were alone.
KNOWN_TO_ALL = "all processes know of it"


class ProcessesError(RuntimeError):
    """The processes cannot work together, or one cannot do its part."""


class Address(NamedTuple):
    """Where a process stands among all, as the command line has it; None: unknown."""

    coordinator: str | None  # host:port of process 0
    num_processes: int | None
    process_id: int | None


def start(
    mode: str,
    address: Address,
    start_seconds: int | None = None,
    silence_seconds: int | None = None,
) -> None:
    """Connects this process with the others, before anything else is asked of JAX.

    Args:
      mode: "off": this process is alone. "on": it is one of several, as `address` says
        or, where that is empty, as JAX finds on Cloud TPU slices and under Slurm,
        Kubernetes and Open MPI. "auto": "on" where there is an address, or where JAX
        finds one.
      address: all of it, or nothing.
      start_seconds: how long to wait for the others; None: as `START_SECONDS` has it.
      silence_seconds: after how long without a sign of life JAX ends this process;
        None: as `SILENCE_SECONDS` has it.

    Raises:
      ConfigError: the address is incomplete or makes no sense.
      ProcessesError: there is none, or the processes have unequal devices.
    """
    _check_address(mode, address)
    given = address.coordinator is not None
    if mode == "off":
        return
    host = (address.coordinator or "").rpartition(":")[0]
    far = not _is_near(host)
    wait = start_seconds or START_SECONDS[far]
    silence = silence_seconds or SILENCE_SECONDS[far]
    if given:
        # Said before: JAX itself ends a process that has waited in vain.
        print(
            f"Process {address.process_id} of {address.num_processes} waits up to "
            f"{wait} s (--start_seconds) for all others at {address.coordinator}.",
            flush=True,
        )
    # Signals are for `experiments.running.stopping`, not for JAX's own service.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            *address,
            coordinator_bind_address=_bind_address(address),
            initialization_timeout=wait,
            heartbeat_timeout_seconds=silence,
            shutdown_timeout_seconds=silence,
        )
    # JAX raises ValueError where it finds no address, and what a broken environment
    # leads to otherwise.
    except Exception as error:
        if mode == "auto" and not given and "coordinator_address" in str(error):
            return
        raise ProcessesError(
            f"the processes cannot be connected ({error}); give "
            "--coordinator_address, --num_processes and --process_id, or "
            "--distributed=off for a process alone."
        ) from None
    devices = jax.device_count()
    if jax.local_device_count() * jax.process_count() != devices:
        raise DeviceError(
            f"process {jax.process_index()} has {jax.local_device_count()} of "
            f"{devices} devices: expected as many for each of {jax.process_count()} "
            "processes."
        )


def _bind_address(address: Address) -> str | None:
    """Where process 0 listens: at the address that the others were given, alone.

    Whoever reaches its port can take a process's place.

    Returns:
      None, for JAX's default (all the machine's addresses, or what the variable says),
      where none was given, and where the one that was leads to this machine by other
      ways than an address of its own: a forwarded port, or a name that stands for the
      loopback here and for this machine elsewhere.
    """
    if address.coordinator is None or address.process_id != 0:
        return None
    if "JAX_COORDINATOR_BIND_ADDRESS" in os.environ:
        return None
    host = address.coordinator.rpartition(":")[0]
    for family, kind, protocol, _, place in socket.getaddrinfo(
        host.strip("[]"), 0, type=socket.SOCK_STREAM
    ):
        loopback = ipaddress.ip_address(place[0]).is_loopback
        with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as s:
            s.bind(place)
            if not loopback or _is_near(host):
                return address.coordinator
    print(
        f"No address of this machine is {host}: process 0 listens at all of them.",
        flush=True,
    )
    return None


def _is_near(host: str) -> bool:
    return host in ("localhost", "127.0.0.1", "[::1]")


def _check_address(mode: str, address: Address) -> None:
    named = dict(
        zip(
            ("--coordinator_address", "--num_processes", "--process_id"),
            address,
            strict=True,
        )
    )
    if mode not in MODES:
        raise ConfigError(f"--distributed={mode}: expected one of {', '.join(MODES)}.")
    missing = [flag for flag, value in named.items() if value is None]
    if missing and len(missing) < len(named):
        raise ConfigError(
            f"{', '.join(missing)}: missing; give all of {', '.join(named)}, or none."
        )
    if missing:
        return
    if mode == "off":
        raise ConfigError(
            f"--distributed=off goes without {', '.join(named)}; leave them out."
        )
    host, _, port = str(address.coordinator).rpartition(":")
    if not (host and port.isdecimal() and int(port) < 2**16):
        raise ConfigError(
            f"--coordinator_address={address.coordinator}: expected HOST:PORT of "
            "process 0, as localhost:1234."
        )
    number, count = address.process_id, address.num_processes
    if number is None or count is None or not 0 <= number < count:
        raise ConfigError(
            f"--process_id={number} with --num_processes={count}: expected 0 to one "
            "less than their number."
        )


def check_same(own: Mapping[str, Any]) -> None:
    """Checks, in all processes, that each was started in the same way.

    Args:
      own: what they must have in common; JSON values.

    Raises:
      ProcessesError: one differs from the first.
    """
    if jax.process_count() == 1:
        return
    first = json.loads(text_of_first_process(json.dumps(own)))

    def compare() -> None:
        differing = [
            f"{key}={value} ({first.get(key)} in process 0)"
            for key, value in json.loads(json.dumps(own)).items()
            if first.get(key) != value
        ]
        if differing:
            raise ProcessesError(
                f"{', '.join(differing)}: expected the same in all processes; start "
                "them with one command, in one environment."
            )

    in_every_process(compare)


def part(say: Callable[[], None]) -> None:
    """Ends the connection with the other processes, all of which end, too.

    Args:
      say: tells the user why, before the others are waited for.
    """
    say()
    if are_several():
        with contextlib.suppress(Exception):
            jax.distributed.shutdown()


def are_several() -> bool:
    """Whether this process is one of several; takes no accelerator to find out."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this is the process that writes files and speaks to the user."""
    return not are_several() or jax.process_index() == 0


def print_once(message: str) -> None:
    """Prints for the user, once however many processes there are."""
    if is_first():
        print(message, flush=True)


def in_every_process(function: Callable[[], Result]) -> Result:
    """Calls a function in every process, and fails in all if it fails in one.

    Args:
      function: without collectives of its own: an error in one process must not leave
        the others waiting in it.

    Raises:
      ProcessesError: it failed in another process, whose error the message has.
    """
    if jax.process_count() == 1:
        return function()
    failure: Exception | None = None
    try:
        result = function()
    # Of whatever kind: the others must not wait for this process.
    except Exception as error:
        failure = error
    own = f"process {jax.process_index()}: {failure!s}" if failure else ""
    message = first_message(own)
    if message:
        told = failure or ProcessesError(message)
        told.add_note(KNOWN_TO_ALL)
        raise told
    return result


def is_known_to_all(error: BaseException) -> bool:
    """Whether all processes raise this error, or its like."""
    return KNOWN_TO_ALL in getattr(error, "__notes__", ())


def in_first_process(function: Callable[[], Any]) -> None:
    """Calls a function in the first process; the others wait, and fail with it.

    Raises:
      ProcessesError: as `in_every_process`.
    """
    in_every_process(function if is_first() else lambda: None)
