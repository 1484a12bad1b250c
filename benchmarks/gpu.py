"""Everything that only a GPU can show, in order of value; `make gpu` is this.

    python -m benchmarks.gpu --output=runs/gpu --data_dir=DATA

The steps are a table below. Each has a time after which it is stopped, so that none
keeps the others waiting; what it had written by then stays. The same command goes on:
finished steps are left alone, stopped and failed ones start again, of which the
trainings go on from their checkpoints. After every step results.md and .json in the
output folder tell how far it is, and each step's output lies beside them.

DATA holds Tiny ImageNet, prepared as docs/imagenet.md says. Without it the comparison
is of the images that come with the project.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import results

FINISHED = "finished"
SECONDS_TO_END = 20  # that a stopped step has to save what it needs
# With XLA's own choice two programs of Inception at 32 x 32 took many minutes to
# compile on an H100, and one minute with these.
QUICK_TO_COMPILE = {
    "XLA_FLAGS": "--xla_gpu_autotune_level=1 --xla_gpu_enable_triton_gemm=false"
}
CORE_TESTS = (
    *("test_batch_norm", "test_moments", "test_statistics", "test_paper_laws"),
    *("test_accuracy", "test_large_values", "test_activations", "test_renormalisation"),
    *("test_ghost", "test_population", "test_linen", "test_nnx", "test_folding"),
)


class Step(NamedTuple):
    """One part of the whole."""

    name: str
    minutes: float
    arguments: Sequence[str]  # of Python
    environment: Mapping[str, str] = {}  # beside this process'


def main(arguments: argparse.Namespace) -> None:
    """Runs what is not finished yet."""
    # So that a step ends with this command, whoever stops it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    folder = Path(arguments.output)
    folder.mkdir(parents=True, exist_ok=True)
    table = steps(folder, arguments.data_dir, arguments.tiny)
    run_steps(table, folder, arguments.minutes)


def steps(folder: Path, data_dir: str | None, tiny: bool) -> list[Step]:
    """What is to be done.

    Args:
      folder: where results go.
      data_dir: of a prepared Tiny ImageNet, or None.
      tiny: the smallest sizes, to rehearse on a CPU.
    """
    small = ("--tiny",) if tiny else ()

    def benchmark(name: str, minutes: float, *flags: str) -> Step:
        output = f"--output={folder / f'{name}.json'}"
        return Step(name, minutes, ("-m", f"benchmarks.{name}", output, *small, *flags))

    def sweep(name: str, minutes: float, *flags: str) -> Step:
        size = "tiny_imagenet" if data_dir else "large"
        command = [
            *("-m", "experiments.inception_sweep", f"--sweep={name}"),
            f"--size={'small' if tiny else size}",
            f"--workdir={folder / name}",
        ]
        if data_dir and not tiny:
            command.append(f"--data_dir={data_dir}")
        changes = (
            ("num_steps=4", "width=0.03125", "eval_examples=100")
            if tiny
            else ("dtype=bfloat16", "separable_stem=False")
        )
        command += [*flags, *(f"--config.{change}" for change in changes)]
        return Step(name, minutes, tuple(command), QUICK_TO_COMPILE)

    tests = [f"tests/bn_jax/{name}.py" for name in CORE_TESTS[: 1 if tiny else None]]
    platforms = {} if tiny else {"TEST_PLATFORMS": "cuda"}
    return [
        Step("devices", 2, ("-c", "import jax; print(jax.devices())")),
        Step("tests", 10, ("-m", "pytest", "-q", "-n", "0", *tests), platforms),
        benchmark("compile_time", 15),
        benchmark("op", 10),
        benchmark("network", 15, "--networks=inception", "--modes=training"),
        benchmark("input", 5),
        sweep("speedup", 60, "--seeds=1" if tiny else "--seeds=3"),
        sweep("delays", 15),
        sweep("variants", 60),
        sweep("rates", 60),
        sweep("batch_sizes", 60),
    ]


def run_steps(table: Sequence[Step], folder: Path, minutes: float | None) -> None:
    """Runs the steps that are not finished, and writes how far they are.

    Args:
      table: the steps.
      folder: for results and outputs.
      minutes: for all of them; None for no limit but each step's own.
    """
    path = folder / "results.json"
    states: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    end = None if minutes is None else time.monotonic() + 60 * minutes
    for step in table:
        if states.get(step.name, {}).get("state") == FINISHED:
            continue
        limit = 60 * step.minutes
        if end is not None:
            limit = min(limit, end - time.monotonic())
        if limit <= 0:
            break
        print(f"== {step.name}, at most {limit:.0f} s", flush=True)
        begin = time.monotonic()
        state = run_step(step, folder / f"{step.name}.log", limit)
        seconds = round(time.monotonic() - begin, 1)
        states[step.name] = {"state": state, "seconds": seconds}
        path.write_text(json.dumps(states, indent=2) + "\n")
        (folder / "results.md").write_text(as_page(table, states, folder))
    print(as_page(table, states, folder))


def run_step(step: Step, log: Path, seconds: float) -> str:
    """Runs a step; returns how it ended.

    Whatever it started ends with it.
    """
    with log.open("a") as output:
        process = subprocess.Popen(
            [sys.executable, *step.arguments],
            env=os.environ | dict(step.environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            _end(process)
            return f"stopped after {seconds:.0f} s"
        except BaseException:
            _end(process)
            raise
    return FINISHED if code == 0 else f"failed with {code}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """Asks a step and all that it started to end, and then makes them."""
    os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=SECONDS_TO_END)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def as_page(table: Sequence[Step], states: Mapping[str, Any], folder: Path) -> str:
    """How far the steps are, and the last line that each wrote."""
    rows = []
    for step in table:
        found = states.get(step.name, {"state": "not yet", "seconds": None})
        log = folder / f"{step.name}.log"
        lines = log.read_text(errors="replace").split("\n") if log.exists() else []
        last = next((line for line in reversed(lines) if line.strip()), "")
        cells = [step.name, f"{step.minutes:g}", found["state"], found["seconds"]]
        rows.append([*cells, last.strip().replace("|", " ")[:100]])
    header = ["step", "minutes at most", "state", "seconds", "last line"]
    return "\n".join(["# What a GPU shows", "", results.table(header, rows), ""])


if __name__ == "__main__":
    parser = results.Parser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--output", default="runs/gpu", help="folder for the results")
    parser.add_argument("--data_dir", help="folder of prepared sets")
    parser.add_argument("--minutes", type=float, help="that all may take together")
    parser.add_argument(
        "--tiny", action="store_true", help="smallest sizes, to rehearse on a CPU"
    )
    main(parser.parse_args())
