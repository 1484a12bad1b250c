"""Sweeps with a stand-in for the runs, and the command lines as a user meets them."""

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

from experiments.configuration.fields import ConfigError
from experiments.inception.comparison.models import PAPER, compare, compare_rates
from experiments.inception.comparison.runs import read_runs
from experiments.inception.config import FIELDS, SIZES, get_config
from experiments.inception.sweeps import running as sweeps
from experiments.inception.sweeps.running import (
    RunFailedError,
    make_tasks,
    run_sweep,
)
from experiments.inception.sweeps.table import RATES, SWEEPS, Sweep, SweptRun
from experiments.running.workdir import WorkdirError
from tests.experiments.helpers import REPOSITORY, command_environment
from tests.experiments.inception.comparison.test_runs import make_folder

# ml_collections loads configuration files in a way that Python is giving up.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

# A run of a sweep: it tells when it starts and ends, and may fail.
STAND_IN = """
import os, pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
def tell(what):
    with (folder.parent / "told").open("a") as file:
        file.write(f"{what} {folder.name}\\n")
print("some output of", folder.name)
if (folder / "summary.json").exists():
    sys.exit()
tell("start")
folder.mkdir(exist_ok=True)
(folder / "environment").write_text(os.environ.get("MALLOC_ARENA_MAX", ""))
for name in sys.argv[2:]:  # to wait for
    for _ in range(10_000):
        if (folder.parent / name).exists():
            break
        time.sleep(0.005)
    else:
        sys.exit(f"error: {name} did not start")
if (folder.parent / f"break_{folder.name}").exists():
    sys.exit(f"error: {folder.name} broke\\n")
(folder / "metrics.jsonl").write_text('{"step": 7, "top1": 5.0}\\n')
(folder / "summary.json").write_text("{}")
tell("end")
"""
SWEEP = Sweep(
    [SweptRun(name, "bn_x5", {"num_steps": 7}) for name in ("a_0.1", "b_0.1", "c_0.1")],
    {"comparison": ("--reference=a",), "rates": ("--x=learning_rate", "--flag")},
    evaluation=("--crops=1",),
)


@pytest.fixture
def compared(monkeypatch):
    """Replaces the runs; returns the list of the commands that look at all of them."""
    commands = []
    original = sweeps.make_tasks

    def make_stand_ins(*arguments):
        return [
            task._replace(
                command=[sys.executable, "-S", "-c", STAND_IN, str(task.folder)]
            )
            for task in original(*arguments)
        ]

    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    monkeypatch.setattr(sweeps, "make_tasks", make_stand_ins)
    monkeypatch.setattr(sweeps, "_backend", lambda: "cpu")
    monkeypatch.setattr(sweeps, "SECONDS_PER_LOOK", 0.01)
    monkeypatch.setattr(
        sweeps.subprocess, "run", lambda command, check: commands.append(command)
    )
    return commands


def make_them_wait_for(monkeypatch, *names) -> None:
    stand_ins = sweeps.make_tasks

    def make_waiting(*arguments):
        return [
            task._replace(command=[*task.command, name])
            for task, name in zip(stand_ins(*arguments), names, strict=True)
        ]

    monkeypatch.setattr(sweeps, "make_tasks", make_waiting)


def told(workdir) -> list[str]:
    return (workdir / "told").read_text().splitlines()


def test_runs_go_in_order_and_are_compared(tmp_path, compared):
    workdir = tmp_path / "new" / "sweep"
    run_sweep(SWEEP, "small", 1, 1, workdir, ())
    names = [run.name for run in SWEEP.runs]
    assert told(workdir) == [f"{w} {name}" for name in names for w in ("start", "end")]
    assert [command[:2] for command in compared] == [[sys.executable, "-m"]] * 3
    assert [command[2:] for command in compared] == [
        [f"experiments.{module}", str(workdir), f"--output={workdir / name}", *given]
        for module, name, *given in (
            ("compare", "comparison", "--reference=a"),
            ("compare", "rates", "--x=learning_rate", "--flag"),
            ("evaluate", "evaluation", "--crops=1"),
        )
    ]
    for name in names:
        # A name may end in something like a file's suffix.
        assert (workdir / f"{name}.log").read_text() == f"some output of {name}\n"
        assert (workdir / name / "environment").read_text() == "1"
    run_sweep(SWEEP, "small", 1, 2, workdir, ())
    assert len(told(workdir)) == 6


def test_a_failed_run_is_reported_and_the_others_go_on(tmp_path, compared):
    (tmp_path / "break_a_0.1").touch()
    (tmp_path / "break_c_0.1").touch()
    with pytest.raises(RunFailedError) as caught:
        run_sweep(SWEEP, "small", 1, 1, tmp_path, ())
    assert str(caught.value) == (
        f"2 of 3 runs failed, the first is {tmp_path / 'a_0.1'}: error: a_0.1 broke "
        "After a remedy the same command goes on."
    )
    assert told(tmp_path)[1:3] == ["start b_0.1", "end b_0.1"]
    assert compared == []
    (tmp_path / "break_a_0.1").unlink()
    (tmp_path / "break_c_0.1").unlink()
    run_sweep(SWEEP, "small", 1, 1, tmp_path, ())
    assert told(tmp_path)[4:] == [
        f"{what} {name}" for name in ("a_0.1", "c_0.1") for what in ("start", "end")
    ]
    assert len(compared) == 3


def test_as_many_jobs_as_asked_run_side_by_side(tmp_path, compared, monkeypatch):
    cores = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {2, 5, 7})
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, core: cores.append(core))
    # The first two wait for one another.
    make_them_wait_for(monkeypatch, "b_0.1", "a_0.1", "a_0.1")
    run_sweep(SWEEP, "small", 1, 2, tmp_path, ())
    assert {line.split()[0] for line in told(tmp_path)[:2]} == {"start"}
    assert "start c_0.1" not in told(tmp_path)[:3]
    assert told(tmp_path)[-1].startswith("end")
    # Their places share the cores.
    assert cores[:2] == [[2, 7], [5]]
    assert cores[2] in cores[:2]


@pytest.mark.parametrize(
    ("backend", "cores", "jobs", "places", "share"),
    [
        ("cpu", {0, 1}, None, [[0], [1]], None),
        ("cpu", {0, 1, 4, 5}, None, [[0, 5], [1], [4]], None),
        ("cpu", {0, 1}, 3, [[0], [1], [0, 1]], None),
        ("cpu", {0, 1}, 50, [[0], [1], [0, 1]], None),
        ("gpu", {0, 1}, None, [[0, 1]], "0.90"),
        ("gpu", {0, 1}, 2, [[0], [1]], "0.45"),
    ],
)
def test_places(tmp_path, compared, monkeypatch, backend, cores, jobs, places, share):
    calls = []

    def record(tasks, *arguments):
        calls.append(arguments)
        return []

    monkeypatch.setattr(sweeps, "_backend", lambda: backend)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: cores)
    monkeypatch.setattr(sweeps, "_run_tasks", record)
    run_sweep(SWEEP, "small", 1, jobs, tmp_path, ())
    ((found, environment),) = calls
    assert found == places
    assert (environment.keys() >= sweeps.KEEP_MEMORY.keys()) == (backend == "cpu")
    assert environment.get("XLA_PYTHON_CLIENT_MEM_FRACTION") == share


def test_the_users_environment_comes_first(tmp_path, compared, monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "3")
    sweep = SWEEP._replace(runs=SWEEP.runs[:1])
    run_sweep(sweep, "small", 1, None, tmp_path, ())
    assert (tmp_path / "a_0.1" / "environment").read_text() == "3"


def test_an_interrupted_sweep_leaves_no_process(tmp_path, compared, monkeypatch):
    processes, start = [], sweeps._start

    def remember(*arguments):
        started = start(*arguments)
        processes.append(started[1])
        return started

    def interrupt(seconds):
        raise KeyboardInterrupt

    make_them_wait_for(monkeypatch, "never", "never", "never")
    monkeypatch.setattr(sweeps, "_start", remember)
    monkeypatch.setattr(sweeps.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(SWEEP, "small", 1, 2, tmp_path, ())
    assert [process.returncode for process in processes] == [-signal.SIGTERM] * 2


def test_progress_counts_the_steps_of_all_runs(tmp_path):
    (tmp_path / "a").mkdir()
    task = sweeps._Task(tmp_path / "a", 9, [])
    assert sweeps._steps_done(task) == 0
    (tmp_path / "a" / "metrics.jsonl").write_text('{"step": 0}\n{"step": 6}\n{"st')
    assert sweeps._steps_done(task) == 6
    (tmp_path / "a" / "summary.json").touch()
    assert sweeps._steps_done(task) == 9


def test_unwritable_workdir(tmp_path, compared):
    (tmp_path / "file").touch()
    with pytest.raises(WorkdirError, match="cannot write to the workdir"):
        run_sweep(SWEEP, "small", 1, 1, tmp_path / "file" / "sweep", ())


# The commands.


def parse(command) -> dict:
    """The configuration that the command of a run gets."""
    values = flags.FlagValues()
    flag = config_flags.DEFINE_config_file(
        "config", flag_values=values, sys_argv=command[2:]
    )
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    assert command[:3] == [sys.executable, "-m", "experiments.inception"]
    assert values(command[2:]) == ["experiments.inception"]
    return flag.value.to_dict() | {"workdir": values["workdir"].value}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", SWEEPS)
def test_commands_configure_what_the_table_says(name, size, tmp_path):
    sweep = SWEEPS[name]
    tasks = make_tasks(sweep, size, 1, tmp_path, ())
    assert len({task.folder for task in tasks}) == len(sweep.runs)
    for task, run in zip(tasks, sweep.runs, strict=True):
        expected = get_config(f"{run.variant},{size}").to_dict() | run.changes
        found = parse(task.command)
        assert found.pop("workdir") == str(tmp_path / run.name)
        assert found == expected
        assert task.num_steps == expected["num_steps"]
        assert task.folder == tmp_path / run.name


def test_the_sweep_of_variants_has_all_of_figure_3(tmp_path):
    runs = SWEEPS["variants"].runs
    assert {run.variant for run in runs} == {*PAPER, "inception_he"}
    # The paper's rate, its failure, and others: the best of them is a reference.
    multiples = {
        run.changes["rate_multiple"] for run in runs if run.variant == "inception"
    }
    assert {1, 5, 30} < multiples
    # The longest first, so that parallel jobs end together.
    steps = [
        task.num_steps
        for task in make_tasks(SWEEPS["variants"], "small", 1, tmp_path, ())
    ]
    assert steps[0] == max(steps)


@pytest.mark.parametrize(
    ("name", "key", "values"),
    [
        ("rates", "initialisation", ("googlenet", "gaussian", "he")),
        ("batch_sizes", "batch_size", (32, 256)),
    ],
)
def test_the_sweeps_of_rates_cross_them_with_and_without_norms(
    name, key, values, tmp_path
):
    configs = [
        parse(task.command)
        for task in make_tasks(SWEEPS[name], "small", 1, tmp_path, ())
    ]
    points = [
        tuple(config[each] for each in ("batch_norm", key, "learning_rate"))
        for config in configs
    ]
    assert len(set(points)) == len(points)
    assert set(points) == set(itertools.product((False, True), values, RATES))
    assert all(config["rate_multiple"] == 1 for config in configs)
    # A rate that is constant, and long enough for a baseline to leave chance.
    assert {config["decay_factor"] for config in configs} == {1.0}
    assert {config["num_steps"] for config in configs} == {3_000}
    # The paper's rates, and some beyond on both sides, where the best may lie.
    baseline = get_config("inception,small").learning_rate
    assert min(RATES) < baseline
    assert max(RATES) > 30 * baseline
    assert {baseline, 5 * baseline, 30 * baseline} <= set(RATES)


def test_the_sweep_of_delays_differs_in_them_alone(tmp_path):
    configs = [
        parse(task.command)
        for task in make_tasks(SWEEPS["delays"], "small", 1, tmp_path, ())
    ]
    rates = {config["learning_rate"] * config["rate_multiple"] for config in configs}
    assert rates == {5 * 0.0015}
    for norm in False, True:
        delays = [c["gradient_delay"] for c in configs if c["batch_norm"] == norm]
        assert delays == sorted({0, *delays})
        assert len(delays) > 2


def test_the_sweep_of_figure_4_is_the_ensemble():
    names = [f"ensemble_{number}" for number in range(1, 7)]
    assert [run.variant for run in SWEEPS["ensemble"].runs] == names
    assert "--crops=1,144" in SWEEPS["ensemble"].evaluation


def test_the_folder_of_the_data_is_handed_on(tmp_path):
    for data_dir, flags_of_it in (("x/y", ["--data_dir=x/y"]), (None, [])):
        for task in make_tasks(SWEEP, "small", 1, tmp_path, (), data_dir):
            found = [each for each in task.command if each.startswith("--data_dir")]
            assert found == flags_of_it


def test_seeds_and_changes_of_the_user(tmp_path):
    sweep = Sweep([SweptRun("one", "ensemble_3", {"num_steps": 9, "width": 0.5})], {})
    changes = ("num_steps=20", "per_activation_rows=('5b',)", "learning_rate=1e-3")
    tasks = make_tasks(sweep, "large", 3, tmp_path, changes)
    assert [task.folder.name for task in tasks] == [f"one_seed{n}" for n in range(3)]
    for number, task in enumerate(tasks):
        config = parse(task.command)
        assert config["seed"] == 3 + number
        assert (config["num_steps"], config["width"]) == (20, 0.5)
        assert config["per_activation_rows"] == ("5b",)
        assert config["learning_rate"] == 1e-3
        assert task.num_steps == 20
    tasks = make_tasks(sweep, "large", 2, tmp_path, ("seed=7",))
    assert [parse(task.command)["seed"] for task in tasks] == [7, 8]


@pytest.mark.parametrize(
    ("change", "message"),
    {
        "learning_rat=1": r"^--config.learning_rat=1: expected --config.KEY=VALUE; ",
        "num_steps": r"^--config.num_steps: expected --config.KEY=VALUE",
        "num_steps=1.5": r"^num_steps=1\.5: expected a whole number\.$",
        "seed=": r"^seed=: expected a whole number\.$",
    }.items(),
)
def test_changes_that_make_no_sense(tmp_path, compared, change, message):
    with pytest.raises(ConfigError, match=message) as caught:
        run_sweep(SWEEP, "small", 1, 1, tmp_path / "sweep", (change,))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize("name", [name for name in SWEEPS if SWEEPS[name].comparisons])
@pytest.mark.parametrize("num_seeds", [1, 2])
def test_comparisons_find_their_references(name, num_seeds, tmp_path):
    for task in make_tasks(SWEEPS[name], "small", num_seeds, tmp_path, ()):
        config = parse(task.command)
        make_folder(Path(config.pop("workdir")), {0: 10.0, 100: 50.0}, **config)
    runs = read_runs([tmp_path])
    for arguments in SWEEPS[name].comparisons.values():
        flags_and_values = [argument.partition("=")[::2] for argument in arguments]
        if ("--x", "learning_rate") in flags_and_values:
            families = compare_rates(runs)["families"]
            points = sum(len(family["points"]) for family in families)
            assert points * num_seeds == len(runs)
            continue
        references = [value for flag, value in flags_and_values]
        assert {flag for flag, _ in flags_and_values} <= {"--reference"}
        found = compare(runs, references)
        names = [reference["name"] for reference in found["references"]]
        assert names == (references or names)
        # Rates of the baseline are in a table of their own.
        left_out = max(len(found["baselines_tried"]) - len(names), 0)
        assert (len(found["models"]) + left_out) * num_seeds == len(runs)


# Command lines. Every test from here on starts a process.


def run_module(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"experiments.{module}", *arguments],
        cwd=REPOSITORY,
        env=command_environment(),
        capture_output=True,
        text=True,
        check=False,
    )


def error_of(*arguments: str) -> str:
    done = run_module(*arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    return done.stderr


def test_help():
    done = run_module("inception", "--help")
    assert done.returncode == 0
    assert done.stderr == ""
    assert done.stdout.startswith("Trains one variant of section 4.2's Inception")
    for key in FIELDS:
        assert f"--config.{key}=" in done.stdout
    for name in ("--workdir: ", "--data_dir: ", "--[no]describe: "):
        assert name in done.stdout


def test_help_of_the_sweep():
    done = run_module("inception_sweep", "--help")
    assert done.returncode == 0
    assert done.stderr == ""
    assert done.stdout.startswith("Trains the variants of section 4.2, or the runs")
    for name in (f"--sweep: <{'|'.join(SWEEPS)}>", "--size: ", "--jobs: "):
        assert name in done.stdout


def test_the_papers_network_is_described():
    done = run_module("inception", "--describe")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    # Weights and biases: the baseline has no batch normalisation.
    assert lines[-1].split() == ["total", "11,178,336", "71", "1,934,857,216"]
    (row,) = (line for line in lines if line.startswith("row_4e"))
    assert row.split()[1] == "7x7x1024"


def test_mistakes_are_answered_in_one_line(tmp_path):
    message = error_of("inception", "--config.learning_rat=1")
    assert "unknown configuration key learning_rat; the keys are " in message
    message = error_of(
        "inception", "--config=experiments/configs/inception.py:bn_x5,tiny"
    )
    assert "unknown variant 'bn_x5,tiny'; expected inception, " in message
    workdir = tmp_path / "sweep"
    sweep = ("inception_sweep", f"--workdir={workdir}")
    message = error_of(*sweep, "--config.learning_rat=1")
    assert "--config.learning_rat=1: expected --config.KEY=VALUE; the keys" in message
    message = error_of(*sweep, "learning_rate=1")
    assert "unexpected argument 'learning_rate=1' (see --help)" in message
    assert not workdir.exists()
