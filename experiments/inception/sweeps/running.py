"""Runs the commands of a sweep side by side, and compares what they leave."""

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from experiments.configuration.fields import ConfigError
from experiments.distributed.progress import progress_bar
from experiments.inception import config as configuration
from experiments.inception.sweeps.table import Sweep
from experiments.running.metrics import read_rows
from experiments.running.new_files import create
from experiments.running.workdir import WorkdirError

SECONDS_PER_LOOK = 1.0  # at what the runs have reached
# glibc gives freed memory back to the system, and every step asks for it again: on a
# CPU that costs a tenth of the time.
KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(8 * 2**30),
    "MALLOC_TOP_PAD_": str(2**30),
    "MALLOC_ARENA_MAX": "1",
}


class RunFailedError(WorkdirError):
    """A run of a sweep failed."""


class _Task(NamedTuple):
    folder: Path
    num_steps: int
    command: list[str]


def run_sweep(
    sweep: Sweep,
    size: str,
    num_seeds: int,
    jobs: int | None,
    workdir: Path,
    changes: Sequence[str],
    data_dir: str | None = None,
) -> None:
    """Trains all runs that are not finished, then compares them.

    Args:
      sweep: what to run.
      size: a key of `SIZES` of the Inception configuration.
      num_seeds: runs of each kind: with its own seed, and those after it.
      jobs: runs side by side; None for as many as is good.
      workdir: folder for the runs' folders and the comparisons.
      changes: "key=value" for the configuration of every run.
      data_dir: folder of prepared tensorflow-datasets, or None.

    Raises:
      ConfigError: a change is none, or of an unknown key.
      RunFailedError: a run failed; the others went on.
      WorkdirError: the workdir cannot be written.
    """
    tasks = make_tasks(sweep, size, num_seeds, workdir, changes, data_dir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WorkdirError(
            f"cannot write to the workdir {workdir} ({error.strerror}); choose another "
            "with --workdir."
        ) from None
    on_cpu = _backend() == "cpu"
    cores = sorted(os.sched_getaffinity(0))
    jobs = min(jobs or (len(cores) if on_cpu else 1), len(tasks))
    # Each place has its share of the cores.
    places = [cores[place::jobs] or cores for place in range(jobs)]
    # On an accelerator the first run would take most of its memory for itself.
    share = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / jobs:.2f}"}
    failed = _run_tasks(tasks, places, KEEP_MEMORY if on_cpu else share)
    if failed:
        raise RunFailedError(
            f"{len(failed)} of {len(tasks)} runs failed, the first is "
            f"{failed[0].folder}: {_last_line(_log(failed[0]))} After a remedy the "
            "same command goes on."
        )
    for name, flags in sweep.comparisons.items():
        _report("compare", workdir, name, flags)
    if sweep.evaluation is not None:
        own = (*sweep.evaluation, *_data_flag(data_dir))
        _report("evaluate", workdir, "evaluation", own)


def _report(module: str, workdir: Path, name: str, flags: Sequence[str]) -> None:
    command = [sys.executable, "-m", f"experiments.{module}", str(workdir)]
    subprocess.run([*command, f"--output={workdir / name}", *flags], check=True)


def _data_flag(data_dir: str | None) -> list[str]:
    return [] if data_dir is None else [f"--data_dir={data_dir}"]


def make_tasks(
    sweep: Sweep,
    size: str,
    num_seeds: int,
    workdir: Path,
    changes: Sequence[str],
    data_dir: str | None = None,
) -> list[_Task]:
    """The commands of a sweep, each with the folder it writes.

    Raises:
      ConfigError: a change is none, of an unknown key, or no number where a number
        is needed.
    """
    for change in changes:
        key, separator, _ = change.partition("=")
        if not separator or key not in configuration.FIELDS:
            raise ConfigError(
                f"--config.{change}: expected --config.KEY=VALUE; the keys are "
                f"{', '.join(sorted(configuration.FIELDS))}."
            )
    given = dict(change.split("=", 1) for change in changes)
    tasks = []
    for run in sweep.runs:
        variant = f"{run.variant},{size}"
        config = configuration.get_config(variant).to_dict() | run.changes | given
        seed, num_steps = (_whole_number(config, key) for key in ("seed", "num_steps"))
        for number in range(num_seeds):
            name = run.name if num_seeds == 1 else f"{run.name}_seed{number}"
            changed = run.changes | given | {"seed": seed + number}
            command = [
                *(sys.executable, "-m", "experiments.inception"),
                f"--config={configuration.__file__}:{variant}",
                *(f"--config.{key}={value}" for key, value in changed.items()),
                f"--workdir={workdir / name}",
                *_data_flag(data_dir),
            ]
            tasks.append(_Task(workdir / name, num_steps, command))
    return tasks


def _whole_number(config: Mapping[str, Any], key: str) -> int:
    try:
        return int(config[key])
    except ValueError:
        raise ConfigError(f"{key}={config[key]}: expected a whole number.") from None


def _run_tasks(
    tasks: Sequence[_Task], places: Sequence[list[int]], environment: dict[str, str]
) -> list[_Task]:
    """Keeps every place busy with a task; returns the tasks that failed."""
    waiting, failed = list(tasks), []
    running: dict[int, tuple[_Task, subprocess.Popen[bytes], IO[bytes]]] = {}
    total = sum(task.num_steps for task in tasks)
    done = {task.folder: _steps_done(task) for task in tasks}
    with progress_bar(total, sum(done.values()), "step") as bar:
        try:
            while waiting or running:
                for place, cores in enumerate(places):
                    if place not in running and waiting:
                        running[place] = _start(waiting.pop(0), cores, environment)
                time.sleep(SECONDS_PER_LOOK)
                for place, (task, process, log) in list(running.items()):
                    ended = process.poll() is not None
                    steps = task.num_steps if ended else _steps_done(task)
                    bar.update(steps - done[task.folder])
                    done[task.folder] = steps
                    if ended:
                        log.close()
                        del running[place]
                        if process.returncode:
                            failed.append(task)
                names = ", ".join(task.folder.name for task, _, _ in running.values())
                bar.set_postfix_str(names, refresh=False)
        finally:
            for _, process, log in running.values():
                process.terminate()
                process.wait()
                log.close()
    return failed


def _start(
    task: _Task, cores: list[int], environment: dict[str, str]
) -> tuple[_Task, subprocess.Popen[bytes], IO[bytes]]:
    log = create(_log(task))
    process = subprocess.Popen(
        task.command,
        # Unbuffered, so that in the log an error comes after what was printed before.
        env={"PYTHONUNBUFFERED": "1"} | environment | os.environ,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    # Before it starts threads, which then share the cores.
    os.sched_setaffinity(process.pid, cores)
    return task, process, log


def _log(task: _Task) -> Path:
    # Not with_suffix: a name may end in a rate, as 0.01, which it would replace.
    return task.folder.with_name(f"{task.folder.name}.log")


def _steps_done(task: _Task) -> int:
    if (task.folder / "summary.json").exists():
        return task.num_steps
    rows = read_rows(task.folder / "metrics.jsonl")
    return int(rows[-1]["step"]) if rows else 0


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no output."


def _backend() -> str:
    """What JAX would run on; asked elsewhere, since asking takes an accelerator."""
    command = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    return subprocess.run(
        command, capture_output=True, text=True, check=True
    ).stdout.strip()
