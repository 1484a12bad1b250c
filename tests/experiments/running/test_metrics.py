import json
import math

import pytest

from experiments.running.metrics import MetricsLog, finite, read_rows
from experiments.running.workdir import WorkdirError


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def write_rows(path, steps):
    log = MetricsLog(path, ())
    for step in steps:
        for network in "ab":
            log.write({"step": step, "network": network, "value": [step / 3]})
    log.close()
    return log.rows


def test_rows_come_back_exactly(path):
    rows = write_rows(path, range(5))
    assert read_rows(path) == rows
    assert rows[7] == {"step": 3, "network": "b", "value": [1.0]}
    assert rows[-1]["value"] == [4 / 3]


def test_rows_are_on_disk_after_flush(path):
    log = MetricsLog(path, ())
    log.write({"step": 0})
    log.flush()
    assert read_rows(path) == [{"step": 0}]
    log.close()


@pytest.mark.parametrize("last", [0, 2, 4])
def test_rewinds_to_a_step(path, last):
    rows = write_rows(path, range(5))
    steps = [step for step in range(last + 1) for _ in "ab"]
    log = MetricsLog(path, steps)
    assert log.rows == rows[: len(steps)]
    assert read_rows(path) == log.rows
    log.write({"step": 99})
    log.close()
    assert read_rows(path) == [*rows[: len(steps)], {"step": 99}]


def test_starts_anew(path):
    write_rows(path, range(5))
    MetricsLog(path, ()).close()
    assert path.read_bytes() == b""


def test_missing_file_has_no_rows(path):
    assert read_rows(path) == []


def test_half_written_last_line_is_dropped(path):
    rows = write_rows(path, range(3))
    content = path.read_bytes()
    last_line = content.rindex(b"\n", 0, -1) + 1
    for size in range(last_line, len(content) - 1):
        path.write_bytes(content[:size])
        assert read_rows(path) == rows[:-1]
    MetricsLog(path, [0, 0, 1, 1]).close()
    assert path.read_bytes() == b"".join(content.splitlines(keepends=True)[:4])


@pytest.mark.parametrize("damage", [b"", b"\xff", b"\0" * 40, b'{"step": 7}\n'])
def test_missing_rows_are_an_error_and_nothing_is_changed(path, damage):
    write_rows(path, range(3))
    lines = path.read_bytes().splitlines(keepends=True)
    damaged = b"".join([*lines[:2], damage, *lines[3:]])
    path.write_bytes(damaged)
    with pytest.raises(WorkdirError, match=f"{path} is damaged: .* step 2 are missing"):
        MetricsLog(path, [0, 0, 1, 1, 2, 2])
    assert path.read_bytes() == damaged


def test_deleted_file_is_an_error(path):
    with pytest.raises(WorkdirError, match="restore it, or choose another --workdir"):
        MetricsLog(path, [0])


def test_not_finite_becomes_null(path):
    log = MetricsLog(path, ())
    log.write({"step": 1, "loss": math.nan, "values": [[math.inf, 1.5], [-math.inf]]})
    log.close()
    expected = {"step": 1, "loss": None, "values": [[None, 1.5], [None]]}
    assert log.rows == [expected]
    assert json.loads(path.read_text()) == expected


def test_finite_goes_into_objects():
    value = {"a": {"b": [math.nan, {"c": math.inf}]}, "d": "nan", "e": None, "f": 3}
    expected = {"a": {"b": [None, {"c": None}]}, "d": "nan", "e": None, "f": 3}
    assert finite(value) == expected
