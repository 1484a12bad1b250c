"""The command for a GPU, with stand-ins for its steps."""

import json
import time

import pytest

from benchmarks.gpu import FINISHED, Step, run_step, run_steps, steps
from experiments.inception.config import FIELDS, SIZES
from experiments.inception.sweeps.table import SWEEPS


def python(name, code, minutes=1.0):
    return Step(name, minutes, ("-c", code))


def states_of(folder):
    found = json.loads((folder / "results.json").read_text())
    return {name: entry["state"] for name, entry in found.items()}


def test_steps_that_finished_are_left_alone_and_others_start_again(tmp_path):
    told = tmp_path / "told"
    table = [
        python("good", f"open({str(told)!r}, 'a').write('good ')"),
        python("bad", f"open({str(told)!r}, 'a').write('bad '); raise SystemExit(3)"),
        python("last", f"open({str(told)!r}, 'a').write('last '); print('the end')"),
    ]
    expected = {"good": FINISHED, "bad": "failed with 3", "last": FINISHED}
    for calls in ("good bad last ", "good bad last bad "):
        run_steps(table, tmp_path, None)
        assert told.read_text() == calls
        assert states_of(tmp_path) == expected
    page = (tmp_path / "results.md").read_text()
    assert "failed with 3" in page
    assert "the end" in page


def test_a_step_that_takes_too_long_ends_with_all_that_it_started(tmp_path):
    alive = tmp_path / "alive"
    child = (
        "import signal, time, pathlib; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"while True: pathlib.Path({str(alive)!r}).touch(); time.sleep(0.02)"
    )
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    table = [python("endless", code, minutes=3 / 60), python("next", "print('next')")]
    run_steps(table, tmp_path, None)
    assert states_of(tmp_path) == {"endless": "stopped after 3 s", "next": FINISHED}
    assert alive.exists()
    alive.unlink()
    time.sleep(0.2)
    assert not alive.exists()


def test_no_step_starts_when_the_time_is_up(tmp_path):
    table = [python("slow", "import time; time.sleep(60)"), python("late", "")]
    run_steps(table, tmp_path, minutes=0.5 / 60)
    assert set(states_of(tmp_path)) == {"slow"}


def test_a_step_has_its_own_environment(tmp_path):
    code = "import os; print(os.environ['PLATFORM_OF_TEST'])"
    step = Step("one", 1, ("-c", code), {"PLATFORM_OF_TEST": "here"})
    assert run_step(step, tmp_path / "log", 60) == FINISHED
    assert (tmp_path / "log").read_text() == "here\n"


@pytest.mark.parametrize("tiny", [False, True])
@pytest.mark.parametrize("data_dir", [None, "data"])
def test_the_table_is_of_sweeps_and_keys_that_there_are(tmp_path, data_dir, tiny):
    names = []
    for step in steps(tmp_path, data_dir, tiny):
        names.append(step.name)
        if "experiments.inception_sweep" not in step.arguments:
            continue
        given = dict(argument.split("=", 1) for argument in step.arguments[2:])
        assert given.pop("--sweep") in SWEEPS
        assert given.pop("--size") in SIZES
        changed = {key for key in given if not key.startswith("--")}
        assert changed <= FIELDS.keys()
        assert ("--data_dir" in given) == (data_dir is not None and not tiny)
    assert len(set(names)) == len(names)
    assert {"tests", "compile_time", "network", "input", "speedup"} <= set(names)
