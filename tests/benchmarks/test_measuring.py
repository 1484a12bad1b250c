"""The measuring itself, on contestants whose times are known."""

import time

import pytest

from benchmarks import measuring, results


def test_turns_are_taken_and_ratios_are_to_the_first():
    seen = []

    def sleeper(name: str, seconds: float):
        def call(turn: int) -> None:
            seen.append((name, turn))
            time.sleep(seconds)

        return call

    calls = {"short": sleeper("short", 0.01), "long": sleeper("long", 0.05)}
    timings = measuring.time_in_turns(calls, 3)
    assert seen == [
        *(("short", 0), ("long", 0), ("short", 1), ("long", 1)),  # to warm up
        *(("short", 0), ("long", 0), ("long", 1), ("short", 1)),
        *(("short", 2), ("long", 2)),
    ]
    assert timings["short"].ratio == 1
    for timing in timings.values():
        assert timing.best <= timing.low <= timing.median <= timing.high


def test_geometric_mean():
    assert measuring.geometric_mean([1, 4]) == pytest.approx(2)


@pytest.mark.parametrize(
    ("argument", "expected"),
    {
        "--rounds=0": "argument --rounds: 0 is not positive",
        "--rounds=x": "argument --rounds: invalid _positive value: 'x'",
        "--round=3": "unrecognized arguments: --round=3",
        "--output=/nowhere/at/all.json": "--output: there is no folder /nowhere/at",
        "more": "unrecognized arguments: more",
    }.items(),
)
def test_mistakes_are_answered_with_one_line(argument, expected, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmark", argument])
    with pytest.raises(SystemExit) as stop:
        results.parse("Measures.", "op")
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {expected} (see --help)\n"


def test_help(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmark", "--help"])
    with pytest.raises(SystemExit) as stop:
        results.parse("Measures.", "op", large="more of it")
    assert not stop.value.code
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("Measures.", "--large", "more of it"))


def test_results_are_read_as_written(tmp_path):
    content = {"machine": {"cores": 2}, "rows": [{"a": 1.5}, {"a": None}], "x": []}
    results.write(tmp_path / "x.json", content)
    assert results.read(tmp_path / "x.json") == content


def test_table():
    assert results.table(["name", "ms"], [["ours", 0.01234], ["theirs", 1234.5]]) == (
        "name    ms    \nours    0.0123\ntheirs  1,234 "
    )


def test_names_given_to_a_flag():
    among = ["torch", "torch, compiled", "flax"]
    assert results.chosen("only", None, among) == among
    assert results.chosen("only", "torch, compiled,flax", among) == among[1:]
    with pytest.raises(SystemExit, match="--only names nnx: expected some of"):
        results.chosen("only", "flax,nnx", among)
