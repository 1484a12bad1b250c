r"""Runs a command of the experiments, with a fault in one of its processes.

    python -m tests.experiments.faulty_run \\
        MODULE PROCESS FAULTY_PROCESS FAULT STEP [ARGUMENTS ...]

The fault befalls the process of that number after so many steps of training.
"""

import os
import runpy
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from experiments.mnist import experiment as networks


def fail() -> None:
    raise RuntimeError("a defect that nobody expected")


FAULTS: dict[str, Callable[[], Any]] = {
    "raise": fail,
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "terminate": lambda: os.kill(os.getpid(), signal.SIGTERM),
    # Long enough for a test to do something to the run meanwhile.
    "sleep": lambda: time.sleep(3),
}


def main() -> None:
    module, number, faulty, fault, step, *arguments = sys.argv[1:]
    step_on = networks.Experiment.step

    def faulty_step(self: Any, states: Any, first: int, piece: Any) -> tuple[Any, Any]:
        if first == int(step) and number == faulty:
            print(f"fault at step {first}", flush=True)
            FAULTS[fault]()
        return step_on(self, states, first, piece)

    networks.Experiment.step = faulty_step  # type: ignore[method-assign]
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
