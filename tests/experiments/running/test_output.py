"""Standard output and error that are lost, in processes of their own."""

import os
import subprocess
import sys

import pytest

from tests.experiments.helpers import REPOSITORY, command_environment

WRITE = """
import os, sys
from experiments.running import output
output.protect()
for _ in range(3):
    print("out " * 1_000)
    print("error " * 1_000, file=sys.stderr)
sys.stdout.flush()
opened = os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY)
assert opened > 2
os.write(opened, b"done")
"""


def run(tmp_path, redirection, code=WRITE, **variables):
    """Runs a shell's line; the code's file says whether it came to its end."""
    path = tmp_path / "done"
    script = tmp_path / "script.py"
    script.write_text(code)
    line = f"{sys.executable} {script} {path} {redirection}"
    done = subprocess.run(
        ["bash", "-c", line],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)} | variables,
        capture_output=True,
        check=False,
    )
    return done, path.exists() and path.read_text() == "done"


@pytest.mark.parametrize(
    "redirection",
    [
        "",
        ">&-",
        "2>&-",
        "<&- >&- 2>&-",
        ">/dev/full",
        "2>/dev/full",
        ">/dev/full 2>&1",
        "| head -c 10",
        "2>&1 | head -c 10",
        "| true",
    ],
)
def test_what_cannot_be_written_is_lost_and_nothing_else(tmp_path, redirection):
    done, finished = run(tmp_path, redirection)
    assert finished
    assert done.returncode == 0
    for noise in (b"Traceback", b"BrokenPipe", b"Exception ignored"):
        assert noise not in done.stderr


def test_what_can_be_written_is(tmp_path):
    done, _ = run(tmp_path, "")
    assert done.stdout.count(b"out ") == done.stderr.count(b"error ") == 3_000


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("utf-8", "1 ± 2 — → … ü │├"),
        ("latin-1", "1 ± 2 - -> ... ü |`"),
        ("ascii", "1 +- 2 - -> ... ? |`"),
    ],
)
def test_terminals_of_other_encodings(tmp_path, encoding, expected):
    code = "from experiments.running import output; output.protect()\n"
    code += "print('1 ± 2 — → … ü │├')"
    done, _ = run(tmp_path, "", code, PYTHONIOENCODING=encoding, PYTHONUTF8="0")
    assert done.stdout.decode(encoding) == expected + "\n"
    assert done.stderr == b""


@pytest.mark.slow
@pytest.mark.parametrize(
    "redirection", ["| head -1", "<&- >&- 2>&-", ">/dev/full 2>&1"]
)
def test_a_real_run_comes_to_its_end(tmp_path, redirection):
    run = tmp_path / "run"
    line = f"{sys.executable} -m experiments.mnist --workdir={run} "
    line += "--config.num_steps=200 --config.num_seeds=1 --config.population_batches=5"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line} {redirection}"],
        cwd=REPOSITORY,
        env=command_environment(),
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0
    assert b"Traceback" not in done.stderr
    assert (run / "summary.json").exists()
