import collections
import contextlib
import math

import numpy as np
import pytest

from experiments.running.metrics import NO_ROWS, MetricsLog, finite, read_rows
from experiments.running.workdir import WorkdirError


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def write_rows(path, steps):
    log = MetricsLog(path, NO_ROWS)
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
    log = MetricsLog(path, NO_ROWS)
    log.write({"step": 0})
    log.flush()
    assert read_rows(path) == [{"step": 0}]
    log.close()


@pytest.mark.parametrize("num_rows", range(11))
def test_goes_back_to_the_rows_of_a_checkpoint(path, num_rows):
    log = MetricsLog(path, NO_ROWS)
    kept = [log.kept]
    for number in range(10):
        log.write({"step": number, "value": (number / 3, math.nan)})
        kept.append(log.kept)
    log.close()
    rows = read_rows(path)
    assert rows[4] == {"step": 4, "value": [4 / 3, None]}
    resumed = MetricsLog(path, kept[num_rows])
    assert resumed.rows == read_rows(path) == rows[:num_rows]
    assert resumed.kept == kept[num_rows]
    for row in rows[num_rows:]:
        resumed.write(row)
    resumed.close()
    assert read_rows(path) == rows
    assert resumed.kept == kept[10]


def test_checkpoints_of_earlier_versions_know_their_step_alone(path):
    rows = write_rows(path, range(5))
    log = MetricsLog(path, 2)
    log.close()
    assert log.rows == read_rows(path) == rows[:6]


def test_without_a_checkpoint_all_rows_stay(path):
    rows = write_rows(path, range(5))
    MetricsLog(path).close()
    assert read_rows(path) == rows


def test_of_several_processes_one_writes(path):
    log = MetricsLog(path, NO_ROWS, writes=False)
    log.write({"step": 1})
    log.check()
    log.close()
    assert log.rows == [{"step": 1}]
    assert not path.exists()


def test_missing_file_has_no_rows(path):
    assert read_rows(path) == []


def test_half_written_last_line_is_dropped(path):
    rows = write_rows(path, range(3))
    content = path.read_bytes()
    last_line = content.rindex(b"\n", 0, -1) + 1
    for size in range(last_line, len(content) - 1):
        path.write_bytes(content[:size])
        assert read_rows(path) == rows[:-1]
    path.write_bytes(content)
    log = MetricsLog(path)
    log.close()
    log.rows.pop()
    expected = log.kept
    path.write_bytes(content[:-3])
    MetricsLog(path, expected).close()
    assert path.read_bytes() == content[:last_line]


def mutations(content):
    """500 of each kind, all of one seed."""
    random = np.random.default_rng(0)
    lines = content.splitlines(keepends=True)
    for _ in range(500):
        at, bit = int(random.integers(len(content))), 1 << int(random.integers(8))
        yield "flipped", content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :]
    for _ in range(500):
        yield "cut", content[: random.integers(len(content))]
    for _ in range(500):
        one, other = sorted(random.choice(len(lines), 2, replace=False))
        changed = list(lines)
        changed[one], changed[other] = lines[other], lines[one]
        yield "swapped", b"".join(changed)
    for _ in range(500):
        changed = list(lines)
        del changed[random.integers(len(lines))]
        yield "deleted", b"".join(changed)


def test_no_mutation_reaches_a_resumed_run_as_other_rows(path):
    """Noticed, with nothing changed; or the rows are what they were."""
    rows = write_rows(path, range(8))
    log = MetricsLog(path)
    kept = log.kept
    log.close()
    noticed = collections.Counter()
    for kind, mutated in mutations(path.read_bytes()):
        path.write_bytes(mutated)
        try:
            log = MetricsLog(path, kept)
        except WorkdirError:
            noticed[kind] += 1
            assert path.read_bytes() == mutated
        else:
            log.close()
            assert log.rows == rows
    assert noticed["cut"] == noticed["swapped"] == noticed["deleted"] == 500
    assert noticed["flipped"] > 480  # the others are spaces, say


def test_no_flipped_bit_reaches_a_reader_as_another_number(path):
    rows = write_rows(path, range(8))
    for kind, mutated in mutations(path.read_bytes()):
        path.write_bytes(mutated)
        with contextlib.suppress(WorkdirError):
            found = read_rows(path)
            # Beside its own keys a row may have one that was the checksum's.
            if kind == "flipped":
                for row in found:
                    assert {key: row.get(key) for key in rows[0]} in rows


def test_damage_after_the_rows_of_the_checkpoint_does_not_matter(path):
    rows = write_rows(path, range(5))
    log = MetricsLog(path)
    del log.rows[4:]
    kept = log.kept
    log.close()
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:4], b"\0" * 100, b"\n", *lines[5:]]))
    MetricsLog(path, kept).close()
    assert read_rows(path) == rows[:4]


def test_deleted_file_is_an_error(path):
    write_rows(path, range(2))
    log = MetricsLog(path)
    kept = log.kept
    log.close()
    path.unlink()
    with pytest.raises(WorkdirError, match="restore it, or choose another --workdir"):
        MetricsLog(path, kept)


def test_not_finite_becomes_null(path):
    log = MetricsLog(path, NO_ROWS)
    log.write({"step": 1, "loss": math.nan, "values": [[math.inf, 1.5], [-math.inf]]})
    log.close()
    expected = {"step": 1, "loss": None, "values": [[None, 1.5], [None]]}
    assert log.rows == [expected]
    assert read_rows(path) == [expected]


def test_finite_goes_into_objects():
    value = {"a": {"b": [math.nan, {"c": math.inf}]}, "d": "nan", "e": None, "f": 3}
    expected = {"a": {"b": [None, {"c": None}]}, "d": "nan", "e": None, "f": 3}
    assert finite(value) == expected
