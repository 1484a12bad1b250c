"""The examples of the documentation run as they stand."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.mnist.config import CONFIGURATION
from experiments.mnist.training import run

DOCS = Path(__file__).parents[1] / "docs"
README = DOCS.parent / "README.md"
# A run of `make mnist`, in seconds: what pages load that name runs/mnist.
SHORT = {
    **{"num_steps": 20, "batch_size": 64, "eval_every": 20, "early_steps": 0},
    **{"milestones": (20,), "population_batches": 2, "probe_examples": 0},
}
# Its names are explained in the text: tests/test_api_page.py gives them values.
SKETCHES = ("api",)


def examples(page: Path) -> list[tuple[str, str]]:
    """Language and code of the blocks that are run: those of Python and of bash."""
    return re.findall(r"```(python|bash)\n(.*?)```", page.read_text(), re.DOTALL)


PAGES = {
    page.stem: examples(page)
    for page in sorted(DOCS.glob("*.md"))
    if examples(page) and page.stem not in SKETCHES
}


def needs_run(page: str) -> bool:
    return any("runs/mnist" in code for _, code in PAGES[page])


@pytest.fixture(scope="module")
def folder_with_run(tmp_path_factory):
    """A folder that `make mnist` was called in."""
    folder = tmp_path_factory.mktemp("mnist")
    config = CONFIGURATION.values() | SHORT
    run(config, folder / "runs/mnist", None)
    return folder


@pytest.mark.parametrize(
    ("page", "number"),
    [
        (page, number)
        for page, blocks in PAGES.items()
        if not needs_run(page)
        for number in range(len(blocks))
    ],
)
def test_example(page, number):
    language, code = PAGES[page][number]
    assert language == "python"
    exec(code, {"__name__": "example"})


@pytest.mark.parametrize("page", [page for page in PAGES if needs_run(page)])
def test_examples_after_make_mnist(page, folder_with_run, monkeypatch):
    """One after the other, as each may use the files of those before."""
    monkeypatch.chdir(folder_with_run)
    environment = dict(
        os.environ,
        PYTHONPATH=str(DOCS.parent),
        PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    )
    for language, code in PAGES[page]:
        if language == "bash":
            subprocess.run(["bash", "-euc", code], env=environment, check=True)
        else:
            exec(code, {"__name__": "example"})


OTHER_HOMES = {"import_weights": "inception"}


def test_every_configuration_named_is_there():
    """By a variant's name alone, which works in any folder."""
    text = "".join(page.read_text() for page in [*DOCS.glob("*.md"), README])
    named = re.findall(r"experiments\.(\w+) [^\n`]*--config=([^\s`|]+)", text)
    assert len(named) > 5
    for experiment, variant in named:
        if not variant.startswith("VARIANT"):
            # A command beside an experiment has the configuration of that.
            home = OTHER_HOMES.get(experiment, experiment)
            config = importlib.import_module(f"experiments.{home}.config")
            assert config.CONFIGURATION.values(variant)


def test_every_test_named_is_there():
    tests = Path(__file__).parent
    sources = {path: path.read_text() for path in tests.rglob("test_*.py")}
    for page in (README, *DOCS.glob("*.md")):
        text = page.read_text()
        for name in re.findall(r"[\w/]*\btest_\w+\.py", text):
            name = name.removeprefix("tests/")
            assert any(f"/{name}" in str(path) for path in sources), (page, name)
        for function in re.findall(r"::(test_\w+)", text):
            found = any(f"def {function}" in source for source in sources.values())
            assert found, (page, function)
