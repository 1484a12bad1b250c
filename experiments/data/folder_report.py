"""What there is to know of the images that became a set, as JSON and as text."""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.data.errors import printable
from experiments.data.folder_shards import Shard, Written
from experiments.data.image_folders import Images

FILE_NAME = "report.json"
_MAX_LISTED = 3_000  # entries of a list in the file, and
_MAX_SHOWN = 20  # classes on a terminal


def make(
    images: Images, shards: Sequence[Shard], written: Sequence[Written], plan: str
) -> dict[str, Any]:
    """The report, as JSON values.

    Args:
      images: all there were.
      shards: how they were shared out.
      written: what came of each shard.
      plan: fingerprint of the images.
    """
    split_of = {file: split for split, files in images.splits.items() for file in files}
    unreadable: dict[str, str] = {}
    copies = defaultdict(list)
    counts = {split: Counter[int]() for split in images.splits}
    for shard, each in zip(shards, written, strict=True):
        unreadable |= each.unreadable
        for file, digest in zip(shard.images, each.digests, strict=True):
            if digest:
                copies[digest].append(file)
                counts[split_of[file]][file.label] += 1
    groups = sorted(sorted(files) for files in copies.values() if len(files) > 1)
    return {
        "plan": plan,
        "classes": {
            name: {split: count[number] for split, count in counts.items()}
            for number, name in enumerate(images.classes)
        },
        "unreadable": _some(unreadable),
        "num_unreadable": len(unreadable),
        "left_out": _some(images.left_out),
        "num_left_out": len(images.left_out),
        "duplicates": [
            [printable(group[0].name), printable(file.name)]
            for group in groups
            for file in group[1:]
        ][:_MAX_LISTED],
        "num_duplicates": sum(len(group) - 1 for group in groups),
        "in_several_splits": sum(
            len({split_of[file] for file in group}) > 1 for group in groups
        ),
        "in_several_classes": sum(
            len({file.label for file in group}) > 1 for group in groups
        ),
    }


def read_plan(directory: Path) -> str | None:
    """The fingerprint of the images of a prepared set; None if it has no report."""
    path = directory / FILE_NAME
    return str(json.loads(path.read_text())["plan"]) if path.exists() else None


def counts(images: Images) -> str:
    """How many files there are of each class, as text, before any is read."""
    found = {
        split: Counter(file.label for file in files)
        for split, files in images.splits.items()
    }
    return _classes(
        {
            name: {split: count[number] for split, count in found.items()}
            for number, name in enumerate(images.classes)
        }
    )


def as_text(report: Mapping[str, Any]) -> str:
    """The report for a terminal: counts, and of problems the number and the first."""
    lines = [_classes(report["classes"])]
    for key, title in (("unreadable", "could not be read"), ("left_out", "left out")):
        for name, reason in list(report[key].items())[:1]:
            lines.append(f"{title}: {report['num_' + key]:,}, as {name}: {reason}")
    for one, other in report["duplicates"][:1]:
        lines.append(
            f"copies of other images: {report['num_duplicates']:,} (in several splits: "
            f"{report['in_several_splits']:,}, in several classes: "
            f"{report['in_several_classes']:,}), as {other} of {one}"
        )
    return "\n".join(lines)


def first_problem(written: Sequence[Written]) -> str:
    """One image that could not be read, and why."""
    problems = (item for each in written for item in each.unreadable.items())
    return next((f"{name}: {reason}" for name, reason in problems), "is none")


def _classes(classes: Mapping[str, Mapping[str, int]]) -> str:
    totals = Counter[str]()
    for count in classes.values():
        totals.update(count)
    lines = [
        ", ".join(f"{split}: {number:,} images" for split, number in totals.items())
    ]
    empty = [name for name, count in classes.items() if not sum(count.values())]
    if empty:
        lines.append(f"  {len(empty):,} classes have none, as {empty[0]}")
    smallest = sorted(
        classes.keys() - set(empty),
        key=lambda name: (sum(classes[name].values()), name),
    )
    lines += [
        f"  {name}: " + " + ".join(f"{number:,}" for number in classes[name].values())
        for name in smallest[:_MAX_SHOWN]
    ]
    if len(smallest) > _MAX_SHOWN:
        lines.append(f"  ... and {len(smallest) - _MAX_SHOWN:,} larger classes")
    return "\n".join(lines)


def _some(entries: Mapping[str, str]) -> dict[str, str]:
    return dict(list(entries.items())[:_MAX_LISTED])
