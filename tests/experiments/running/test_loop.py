"""The loop with states that are numbers: no network is needed to try it."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.configuration.fields import Configuration, Field, Role
from experiments.distributed import parallel
from experiments.running import loop, stopping
from experiments.running.loop import Plan, fit
from experiments.running.metrics import read_rows
from experiments.running.record import Measured, Record
from experiments.running.workdir import WorkdirError
from experiments.training.state import TrainState
from tests.experiments.helpers import read_files

LAST = 12
CHOICES = Configuration(
    {
        "rate": Field(1, "a number"),
        "workers": Field(1, "a number", role=Role.LAUNCH),
    },
    lambda variant: {},
)


def start():
    state = TrainState(jnp.int32(0), {"w": jnp.zeros(2)}, {}, ())
    return parallel.replicate({"one": state})


class Sums:
    """Adds the numbers that it is fed; its loss is what it adds."""

    def __init__(self, fail_at=None, losses=None):
        self.calls = []
        self._fail_at, self._losses = fail_at, losses or {}

    def __call__(self, states, done, piece):
        if self._fail_at is not None and done >= self._fail_at:
            raise ZeroDivisionError
        self.calls.append((done, len(piece)))
        state = states["one"]
        params = {"w": state.params["w"] + sum(piece)}
        losses = [self._losses.get(number, float(number)) for number in piece]
        new = state._replace(step=state.step + len(piece), params=params)
        return parallel.replicate({"one": new}), {"one": jnp.array(losses)}


def feed(first, stops):
    """The number of each step, from 1, up to three at once."""
    for stop in stops:
        while first < stop:
            count = min(3, stop - first)
            yield count, list(range(first + 1, first + count + 1))
            first += count


def measure(step, states, losses):
    total = float(states["one"].params["w"][0])
    loss = float(losses["one"]) if losses else None
    row = {"step": step, "total": total, "loss": loss}
    return Measured({"metrics": [row]}, {"total": total}, {"total": f"{total}"}, total)


def make_record(workdir, **config):
    return Record(workdir, {"rate": 1} | config, CHOICES, ["metrics"])


def make_plan(workdir, **changes):
    if workdir:
        workdir.mkdir(exist_ok=True)
    plan = Plan(
        num_steps=LAST,
        measure=measure,
        evaluations={0, 4, LAST},
        saves={6, LAST},
        record=make_record(workdir) if workdir else None,
        steps_per_look=5,
    )
    return plan._replace(**changes)


def test_steps_evaluations_and_rows(tmp_path):
    step = Sums()
    trained = fit(start(), step, feed, make_plan(tmp_path))
    # Pieces end at looks (5, 10), evaluations (4), saves (6), and the end.
    assert step.calls == [(0, 3), (3, 1), (4, 1), (5, 1), (6, 3), (9, 1), (10, 2)]
    assert trained.step == LAST
    assert trained.diverged_at is None
    assert trained.states["one"].params["w"].tolist() == [78, 78]
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert rows == trained.rows["metrics"]
    assert rows == [
        {"step": 0, "total": 0, "loss": None},
        {"step": 4, "total": 10, "loss": 2.5},
        {"step": 12, "total": 78, "loss": 11.5},
    ]
    steps = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert steps == {"6", "12"}  # the two newest; the first was of step 0


@pytest.mark.parametrize("at", [0, 5, 7, 10])
def test_a_run_that_fails_goes_on_to_the_same_end(tmp_path, at, capsys):
    whole = fit(start(), Sums(), feed, make_plan(tmp_path / "whole"))
    with pytest.raises(ZeroDivisionError):
        fit(start(), Sums(fail_at=at), feed, make_plan(tmp_path / "run"))
    resumed = fit(start(), Sums(), feed, make_plan(tmp_path / "run"))
    step = 6 if at >= 6 else 0
    going_on = f"Going on from the checkpoint of step {step} in {tmp_path / 'run'}."
    assert going_on in capsys.readouterr().out
    assert resumed.rows == whole.rows
    assert resumed.states["one"].params["w"].tolist() == [78, 78]


def test_a_finished_run_takes_no_more_steps(tmp_path):
    fit(start(), Sums(), feed, make_plan(tmp_path))
    step = Sums()
    trained = fit(start(), step, feed, make_plan(tmp_path))
    assert step.calls == []
    assert len(trained.rows["metrics"]) == 3


def test_without_a_record_nothing_is_kept(tmp_path):
    trained = fit(start(), Sums(), feed, make_plan(None, evaluations=(), saves=()))
    assert trained.rows == {}
    assert trained.states["one"].params["w"].tolist() == [78, 78]


class Asked:
    """A run that is asked to stop: from the n-th time on that somebody looks."""

    def __init__(self, monkeypatch, looks):
        self.looks = looks
        monkeypatch.setattr(stopping, "is_asked", self)

    def __call__(self):
        self.looks -= 1
        return self.looks <= 0


@pytest.mark.parametrize("looks", range(1, 8))
def test_asked_at_any_look_it_saves_and_goes_on_to_the_same_end(
    tmp_path, monkeypatch, looks
):
    """Before an evaluation and in it, at a save, at the last step."""

    def measure_piecewise(step, states, losses):
        stopping.check()
        return measure(step, states, losses)

    whole = fit(start(), Sums(), feed, make_plan(tmp_path / "whole"))
    plan = make_plan(tmp_path / "run", measure=measure_piecewise)
    first = Sums()
    with monkeypatch.context() as patch:
        Asked(patch, looks)
        with pytest.raises(stopping.Stopped, match="goes on from step"):
            fit(start(), first, feed, plan)
    second = Sums()
    resumed = fit(start(), second, feed, plan)
    assert [number for number, _ in first.calls + second.calls] == sorted(
        {number for number, _ in first.calls + second.calls}
    )  # no step was taken twice
    assert resumed.rows == whole.rows
    assert resumed.states["one"].params["w"].tolist() == [78, 78]


def test_an_evaluation_at_the_start_is_made_up_for(tmp_path):
    def fail(*_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit(start(), Sums(), feed, make_plan(tmp_path, measure=fail))
    assert fit(start(), Sums(), feed, make_plan(tmp_path)).rows["metrics"][0] == {
        "step": 0,
        "total": 0,
        "loss": None,
    }


def test_without_a_record_nobody_waits_for_a_signal(monkeypatch):
    def held():
        raise AssertionError("nothing would be lost")

    monkeypatch.setattr(stopping, "held", held)
    fit(start(), Sums(), feed, make_plan(None, evaluations=(), saves=()))


# The run that is not the one you think.


def stopped_at_6(workdir):
    with pytest.raises(ZeroDivisionError):
        fit(start(), Sums(fail_at=7), feed, make_plan(workdir))
    return read_files(workdir, but=(".lock",))


def refused(workdir, match, plan=None):
    before = read_files(workdir)
    with pytest.raises(WorkdirError, match=match) as caught:
        fit(start(), Sums(), feed, plan or make_plan(workdir))
    assert "\n" not in str(caught.value)
    assert read_files(workdir) == before


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path):
    stopped_at_6(tmp_path)
    plan = make_plan(tmp_path, record=make_record(tmp_path, rate=2))
    refused(tmp_path, r"6 is of a run of another .*: rate: 1 there, 2 now\.", plan)


def test_what_only_launches_may_differ(tmp_path):
    stopped_at_6(tmp_path)
    plan = make_plan(tmp_path, record=make_record(tmp_path, workers=2))
    assert fit(start(), Sums(), feed, plan).step == LAST


@pytest.mark.parametrize(
    ("setting", "value"),
    [("jax_default_prng_impl", "rbg"), ("jax_threefry_partitionable", False)],
)
def test_settings_that_change_numbers_are_compared(tmp_path, setting, value):
    stopped_at_6(tmp_path)
    before = getattr(jax.config, setting)
    jax.config.update(setting, value)
    try:
        refused(tmp_path, f"was saved with {setting}={before}, and it is {value} now")
    finally:
        jax.config.update(setting, before)


def test_another_version_is_named(tmp_path, monkeypatch, capsys):
    stopped_at_6(tmp_path)
    monkeypatch.setattr(jax, "__version__", "99.9")
    fit(start(), Sums(), feed, make_plan(tmp_path))
    assert "From here on with jax 99.9 in place of " in capsys.readouterr().out


def test_rows_of_another_run_are_refused(tmp_path):
    stopped_at_6(tmp_path)
    fit(start(), Sums(losses={1: 9.0}), feed, make_plan(tmp_path / "other"))
    shutil.copy(tmp_path / "other" / "metrics.jsonl", tmp_path / "metrics.jsonl")
    refused(tmp_path, "metrics.jsonl is damaged, or of another run: its first 2 rows")


@pytest.mark.parametrize("what", ["deleted", "emptied", "file", "dangling", "loop"])
def test_rows_without_checkpoints_are_refused(tmp_path, what):
    """As when the volume that has them is not mounted."""
    stopped_at_6(tmp_path)
    folder = tmp_path / "checkpoints"
    folder.rename(tmp_path / "volume")
    if what == "emptied":
        folder.mkdir()
    elif what == "file":
        folder.write_text("")
    elif what == "dangling":
        folder.symlink_to(tmp_path / "not_mounted")
    elif what == "loop":
        folder.symlink_to(folder.name)
    message = "is no folder that can be read"
    if what in ("deleted", "emptied"):
        message = "has rows, but there is no checkpoint in"
    refused(tmp_path, message)
    # With the volume back it goes on.
    folder.unlink() if folder.is_symlink() or folder.is_file() else None
    folder.rmdir() if folder.is_dir() else None
    (tmp_path / "volume").rename(folder)
    assert fit(start(), Sums(), feed, make_plan(tmp_path)).step == LAST


@pytest.mark.parametrize("name", ["012", "\u0661\u0662", "\uff19"])
def test_a_checkpoint_of_an_odd_name_is_refused(tmp_path, name):
    stopped_at_6(tmp_path)
    shutil.copytree(tmp_path / "checkpoints" / "6", tmp_path / "checkpoints" / name)
    refused(tmp_path, f"{name} has the name of no checkpoint")


@pytest.mark.parametrize("target", ["nothing", "9", "file"])
def test_a_link_in_place_of_the_newest_checkpoint_is_refused(tmp_path, target):
    stopped_at_6(tmp_path)
    (tmp_path / "checkpoints" / "file").write_text("")
    (tmp_path / "checkpoints" / "9").symlink_to(target)
    refused(tmp_path, "9 is no folder that can be read")


@pytest.mark.parametrize("what", ["deleted", "replaced", "workdir"])
def test_rows_that_go_nowhere_are_noticed(tmp_path, what):
    """At the next save, and not never."""
    path = tmp_path / "run" / "metrics.jsonl"

    def measure_and_lose(step, states, losses):
        if step == 4:
            if what == "workdir":
                shutil.rmtree(path.parent)
            elif what == "deleted":
                path.unlink()
            else:
                shutil.copy(path, path.with_name("copy"))
                path.with_name("copy").replace(path)
        return measure(step, states, losses)

    with pytest.raises(WorkdirError, match="was deleted or replaced while the run"):
        fit(start(), Sums(), feed, make_plan(path.parent, measure=measure_and_lose))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_network_that_diverges_ends_its_run(tmp_path, capsys, bad):
    step = Sums(losses={8: bad, 9: bad})
    plan = make_plan(tmp_path, stop_if_diverged=True)
    trained = fit(start(), step, feed, plan)
    assert trained.step == trained.diverged_at == 8
    assert "Diverged: the loss of step 8 is not finite." in capsys.readouterr().out


def test_where_others_go_on_a_network_that_diverges_is_named_once(tmp_path, capsys):
    step = Sums(losses={number: float("nan") for number in range(8, 13)})
    plan = make_plan(tmp_path, name_replica=lambda network, i: f"{network} number {i}")
    trained = fit(start(), step, feed, plan)
    assert trained.diverged_at is None
    out = capsys.readouterr().out
    assert out.count("Diverged by step 10: one number 0. The others go on.") == 1
    assert out.count("Diverged") == 1
    assert json.loads(json.dumps(trained.rows))["metrics"][-1]["loss"] is None


def test_the_host_waits_on_cpu_for_every_piece(monkeypatch):
    """Forced host devices can deadlock with several programs under way."""
    waited = []
    monkeypatch.setattr(jax, "block_until_ready", waited.append)
    for backend, expected in (("cpu", [0, 1, 2, 3]), ("gpu", [0, 1])):
        monkeypatch.setattr(jax, "default_backend", lambda name=backend: name)
        waited.clear()
        losses = loop._Losses(make_plan(None), 0)
        for number in range(4):
            losses.add({"one": number})
        assert [each["one"] for each in waited] == expected


def test_feeds_are_closed_whatever_happens(tmp_path):
    closed = []

    def watched(first, stops):
        try:
            yield from feed(first, stops)
        finally:
            closed.append(True)

    with pytest.raises(ZeroDivisionError):
        fit(start(), Sums(fail_at=3), watched, make_plan(tmp_path))
    assert closed == [True]
    assert np.isfinite(start()["one"].params["w"]).all()
