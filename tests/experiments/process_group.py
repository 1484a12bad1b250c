"""Several real processes of one run, on this machine, and what became of them."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.experiments.helpers import REPOSITORY, command_environment

FAULTY = "tests.experiments.faulty_run"
SECONDS_TO_END = 300.0  # more than any of these runs takes on a busy machine


class Ended(NamedTuple):
    """A process that ended."""

    code: int
    output: str
    seconds: float  # from when the last fault was, or from the start


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return int(listener.getsockname()[1])


class ProcessGroup:
    """Processes of one command, connected with each other."""

    def __init__(
        self,
        folder: Path,
        count: int,
        arguments: Sequence[str],
        *,
        present: Sequence[int] | None = None,
        devices: int = 1,
        module: str = "experiments.mnist",
        fault: Sequence[str] = (),
        folders: Sequence[Path] = (),
        of_the_last: tuple[Mapping[str, str], Sequence[str]] = ({}, ()),
    ) -> None:
        """Starts them.

        Args:
          folder: for the outputs.
          count: how many there should be.
          arguments: of the command, the same for all.
          present: numbers of those that are started; None: all.
          devices: of each.
          module: the command.
          fault: arguments of `faulty_run`: a fault of one process.
          folders: that they run in, where it is not the repository.
          of_the_last: variables and arguments that the last one has beside these.
        """
        address = f"localhost:{free_port()}"
        variables = {
            "PYTHONPATH": str(REPOSITORY),
            "PYTHONUNBUFFERED": "1",
            # Beside the folder, for all tests: most run the same programs.
            "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        variables["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
        self.processes = {}
        self._logs = {}
        self._since = time.monotonic()
        for number in range(count) if present is None else present:
            program = ["-m", module]
            if fault:
                program = ["-m", FAULTY, module, str(number), *fault]
            # One process needs no connection.
            place = [
                f"--coordinator_address={address}",
                f"--num_processes={count}",
                f"--process_id={number}",
            ] * (count > 1)
            more, last = of_the_last if number == count - 1 else ({}, ())
            directory = folders[number] if folders else REPOSITORY
            directory.mkdir(exist_ok=True)
            self._logs[number] = folder / f"{address}_{number}.log"
            with self._logs[number].open("w") as log:
                self.processes[number] = subprocess.Popen(
                    [
                        sys.executable,
                        *program,
                        *arguments,
                        *(place if count > 1 else ()),
                        *last,
                    ],
                    cwd=directory,
                    env=command_environment(**variables, **more),
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )

    def output(self, number: int) -> str:
        return self._logs[number].read_text(errors="replace")

    def wait_for(self, text: str, number: int = 0) -> None:
        """Waits until a process has printed something."""
        deadline = time.monotonic() + SECONDS_TO_END
        while text not in self.output(number):
            assert self.processes[number].poll() is None, self.output(number)
            assert time.monotonic() < deadline, self.output(number)
            time.sleep(0.05)

    def signal(self, number: int, what: int) -> None:
        self.processes[number].send_signal(what)
        self._since = time.monotonic()

    def wait(self, *numbers: int) -> Iterator[Ended]:
        """Waits for processes to end, for all of them if none is named."""
        for number in numbers or self.processes:
            code = self.processes[number].wait(SECONDS_TO_END)
            yield Ended(code, self.output(number), time.monotonic() - self._since)

    def __enter__(self) -> "ProcessGroup":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()
