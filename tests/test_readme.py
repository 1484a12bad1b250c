"""The README: its snippet runs, it is short, and what it points to is there."""

import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text()
# What fits on a screen beside the title of a window.
LINES_BEFORE_THE_FIGURE = 40


def test_the_snippet_runs_as_pasted():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, object] = {}
    exec(code, names)
    assert names["y"].shape == names["x"].shape


def test_it_is_short():
    assert len(README.split()) <= 700
    before, _, _ = README.partition("![")
    assert before.count("\n") <= LINES_BEFORE_THE_FIGURE
    (table,) = re.findall(r"\| bn_jax \|.*?\n\n", README, re.DOTALL)
    rows = table.strip().splitlines()[2:]
    assert len(rows) <= 8


def test_what_it_points_to_is_there():
    links = re.findall(r"\]\(([^)]*)\)", README)
    here = [link for link in links if not link.startswith("https://")]
    assert len(here) > 20
    files = {link.partition("#")[0] for link in here}
    assert [file for file in files if not (REPOSITORY / file).is_file()] == []


def test_files_of_the_architecture_exist():
    """The map names every module of bn_jax, every command and every folder."""
    page = REPOSITORY / "docs" / "architecture.md"
    (listing,) = re.findall(
        r"# Architecture\n\n```\n(.*?)```", page.read_text(), re.DOTALL
    )
    listed = set()
    package = folder = REPOSITORY
    for line in listing.splitlines():
        if start := re.match(r"(\w+)/", line):
            package = folder = REPOSITORY / start[1]
            listed.add(package)
        elif start := re.match(r"  ([\w/]+)/", line):
            folder = package / start[1]
            listed.add(folder)
        elif re.match(r"  \w", line):
            folder = package
        listed |= {folder / name for name in re.findall(r"\b\w+\.py\b", line)}
    assert [path for path in listed if not path.exists()] == []
    packages = [REPOSITORY / name for name in ("bn_jax", "experiments")]
    expected = {path for each in packages for path in each.glob("*.py")}
    expected |= {
        path.parent for each in packages for path in each.glob("**/__init__.py")
    }
    assert {path for path in expected if path.name != "__init__.py"} <= listed
