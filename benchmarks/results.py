"""Results as JSON with the machine they come from, and as tables."""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from experiments.running import tables
from experiments.running.provenance import git_revision

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    *("jax", "flax", "optax", "dm-haiku", "equinox", "keras", "torch"),
    *("tensorflow", "tensorflow-cpu", "opencv-python-headless", "numpy"),
)


class Parser(argparse.ArgumentParser):
    """Answers mistakes with one line."""

    def error(self, message: str) -> NoReturn:
        """Exits with 2."""
        self.exit(2, f"error: {message} (see --help)\n")


def parse(documentation: str | None, name: str, **options: str) -> argparse.Namespace:
    """Reads a benchmark's command line.

    Args:
      documentation: what --help says first.
      name: of the file that results go to by default.
      **options: names of further flags and what they mean.

    Returns:
      `output`, a path; `rounds`, `cores` and `tiny`; and the further ones, strings or
      None.
    """
    parser = Parser(
        prog=f"python -m benchmarks.{name}",
        description=documentation,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=RESULTS / f"{name}.json",
        help="JSON file to write (default: %(default)s)",
    )
    parser.add_argument(
        "--rounds",
        type=_positive,
        default=None,
        help="timed calls of each contestant (default: the benchmark's own)",
    )
    parser.add_argument(
        "--cores",
        type=_positive,
        default=None,
        help="run on so many cores; on 1 the processor's time is taken, which others' "
        "work on the machine changes little (default: all)",
    )
    parser.add_argument(
        "--tiny", action="store_true", help="smallest sizes, to see that it runs"
    )
    for option, meaning in options.items():
        parser.add_argument(f"--{option}", default=None, help=meaning)
    arguments = parser.parse_args()
    if not arguments.output.parent.is_dir():
        parser.error(f"--output: there is no folder {arguments.output.parent}")
    return arguments


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def chosen(flag: str, names: str | None, among: Sequence[str]) -> list[str]:
    """A flag's value, names with commas between, as a list; all if it was not given.

    Raises:
      SystemExit: a name is not among those that there are.
    """
    if names is None:
        return list(among)
    # A comma before a space is part of a name.
    found = re.split(r",(?! )", names)
    if unknown := [name for name in found if name not in among]:
        raise SystemExit(
            f"error: --{flag} names {'; '.join(unknown)}: expected some of these, with "
            f"commas between: {'; '.join(among)}."
        )
    return found


def machine() -> dict[str, Any]:
    """What the numbers depend on beside the code, as JSON values."""
    import jax

    versions = {package: version(package) for package in PACKAGES}
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "git_revision": git_revision(Path(__file__)),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": [round(load, 1) for load in os.getloadavg()],
        "devices": [device.device_kind for device in jax.devices()],
        "python": platform.python_version(),
        "packages": {name: found for name, found in versions.items() if found},
    }


def version(package: str) -> str | None:
    """Of an installed distribution; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Writes results, one row of every list of rows a line."""
    lines = []
    for key, value in content.items():
        if isinstance(value, list):
            rows = ",\n".join(f"  {json.dumps(row)}" for row in value)
            lines.append(f" {json.dumps(key)}: [\n{rows}\n ]")
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(value)}")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def read(path: Path) -> Any:
    """Reads what `write` wrote."""
    return json.loads(path.read_text())


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table for a terminal."""
    return tables.table(columns, rows, markdown=False)
