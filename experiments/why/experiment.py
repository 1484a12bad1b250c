"""The parts one after another: what is measured is kept, and not measured again."""

import contextlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.configuration.fields import as_json, as_tuple
from experiments.distributed.progress import progress_bar
from experiments.running import provenance
from experiments.running.figures import save
from experiments.running.metrics import MetricsLog, finite
from experiments.running.workdir import open_workdir, write_json, write_whole
from experiments.why.config import CONFIGURATION
from experiments.why.data import check, load
from experiments.why.part import Part, Row
from experiments.why.parts import (
    depth,
    dropout,
    jacobians,
    landscape,
    order,
    outside,
    shift,
)

PARTS: Mapping[str, Part] = {
    "landscape": landscape.PART,
    "shift": shift.PART,
    "jacobians": jacobians.PART,
    "outside": outside.PART,
    "depth": depth.PART,
    "order": order.PART,
    "dropout": dropout.PART,
}


def run(
    config: dict[str, Any],
    workdir: Path,
    data_dir: str | None,
    parts: Mapping[str, Part] = PARTS,
) -> None:
    """Measures what is not measured yet, then writes tables and figures.

    Args:
      config: as `experiments.why.config` has it.
      workdir: folder for the results.
      data_dir: folder of prepared tensorflow-datasets, or None.
      parts: by the names that `config["parts"]` has.

    Raises:
      ConfigError: the configuration makes no sense.
      DataError: the data set cannot be read.
      WorkdirError: the workdir cannot be used.
    """
    CONFIGURATION.check(config)
    check(config)
    data = load(config, data_dir)
    described = {**config, "data_checksum": data.checksum}
    with contextlib.ExitStack() as stack:
        stack.enter_context(open_workdir(workdir, described, CONFIGURATION))
        log = stack.enter_context(
            contextlib.closing(MetricsLog(workdir / "results.jsonl"))
        )
        coming = [
            (name, setting)
            for name in as_tuple(config["parts"])
            for setting in as_json(parts[name].settings(config))
            if not _rows_of(log.rows, name, setting)
        ]
        done = len(log.rows)
        bar = stack.enter_context(progress_bar(done + len(coming), done, "setting"))
        for name, setting in coming:
            values = " ".join(map(str, setting.values()))
            bar.set_postfix_str(f"{name} {values}", refresh=False)
            began = time.monotonic()
            measured = parts[name].measure(config, data, setting)
            seconds = round(time.monotonic() - began, 1)
            row = {"part": name, "setting": setting, "measured": measured}
            log.write({**row, "seconds": seconds})
            log.flush()
            log.check()
            bar.update()
        text = _conclude(config, log.rows, workdir, parts)
    print(text)
    print(f"Figures, why.md, results.jsonl and summary.json are in {workdir}.")


def _conclude(
    config: Mapping[str, Any],
    rows: Sequence[Row],
    workdir: Path,
    parts: Mapping[str, Part],
) -> str:
    """Writes tables and figures of all parts that are measured; returns the tables."""
    sections = ["# Why batch normalisation helps"]
    seconds = {}
    for name, part in parts.items():
        of_part = _rows_of(rows, name)
        if not of_part:
            continue
        save(part.draw(of_part), workdir / name)
        sections += [f"## {part.title}", f"![{part.title}]({name}.png)"]
        sections.append(part.tables(of_part))
        seconds[name] = round(sum(row["seconds"] for row in of_part), 1)
    text = "\n\n".join(sections) + "\n"
    write_whole(workdir / "why.md", text)
    summary = {**provenance.describe(), "config": dict(config), "seconds": seconds}
    write_json(workdir / "summary.json", finite(summary))
    return text


def _rows_of(rows: Sequence[Row], part: str, setting: Any = None) -> list[Row]:
    """The rows of a part, or of one setting of it."""
    return [
        row for row in rows if row["part"] == part and setting in (None, row["setting"])
    ]
