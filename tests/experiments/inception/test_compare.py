"""The command line as a user meets it: every test here starts processes."""

import json
import subprocess
import sys

import pytest

from tests.experiments.helpers import REPOSITORY, command_environment, read_files
from tests.experiments.inception.comparison.test_runs import make_folder


def run_compare(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "experiments.compare", *map(str, arguments)],
        cwd=REPOSITORY,
        env=command_environment(),
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def sweep(tmp_path):
    folder = tmp_path / "sweep"
    make_folder(folder / "b", {0: 10, 10: 50, 20: 70}, variant="inception")
    make_folder(folder / "a", {0: 10, 10: 71, 20: 80})
    return folder


def test_compares_with_the_reference(sweep, tmp_path):
    output = tmp_path / "new" / "output"
    # Flags may stand anywhere.
    done = run_compare(sweep / "a", f"--output={output}", sweep)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    files = read_files(output)
    assert files.keys() == {
        *("comparison.json", "comparison.md"),
        *("figure2.png", "figure2.svg", "figure3.png", "figure3.svg"),
    }
    comparison = json.loads(files["comparison.json"])
    (reference,) = comparison["references"]
    assert reference["name"] == "inception"
    ratios = [
        reach["ratio"] for model in comparison["models"] for reach in model["reach"]
    ]
    assert ratios == [1, 2]
    page = files["comparison.md"].decode()
    assert page in done.stdout
    assert str(output) in done.stdout
    again = run_compare(sweep, f"--output={output}", "--reference=inception")
    assert again.returncode == 0
    assert read_files(output) == files


def test_rates(sweep, tmp_path):
    output = tmp_path / "output"
    done = run_compare("--x=learning_rate", f"--output={output}", sweep)
    assert done.returncode == 0, done.stderr
    files = read_files(output)
    assert files.keys() == {"rates.json", "rates.md", "rates.png", "rates.svg"}
    families = json.loads(files["rates.json"])["families"]
    assert [family["name"] for family in families] == ["inception", "bn_x5"]
    assert files["rates.md"].decode() in done.stdout


def test_help():
    done = run_compare("--help")
    assert done.returncode == 0
    assert done.stderr == ""
    assert done.stdout.startswith("Compares training runs")
    for flag in ("--output:", "--reference:", "--x:"):
        assert flag in done.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    {
        "nothing": ([], "no run to compare"),
        "no folder": (["{sweep}/none"], "{sweep}/none holds no run"),
        "reference": (
            ["{sweep}", "--reference=nosuch"],
            "there is no model --reference=nosuch: give --reference=NAME, once or "
            "twice, of: inception; bn_x5.",
        ),
        "axis": (
            ["{sweep}", "--x=time"],
            "value should be one of <steps|learning_rate>",
        ),
        "output": (
            ["{sweep}", "--output={sweep}/a/config.json"],
            "choose another --output",
        ),
    }.values(),
)
def test_mistakes_are_answered_with_one_line(sweep, tmp_path, arguments, expected):
    before = read_files(tmp_path)
    done = run_compare(*(argument.format(sweep=sweep) for argument in arguments))
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert expected.format(sweep=sweep) in done.stderr
    assert read_files(tmp_path) == before
