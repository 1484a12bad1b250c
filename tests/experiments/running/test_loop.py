"""The loop with states that are numbers: no network is needed to try it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.distributed import parallel
from experiments.distributed.preemption import PreemptedError
from experiments.running import loop
from experiments.running.loop import Plan, fit
from experiments.running.metrics import read_rows
from experiments.running.record import Measured, Record
from experiments.training.state import TrainState

LAST = 12


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


def make_plan(workdir, **changes):
    if workdir:
        workdir.mkdir(exist_ok=True)
    plan = Plan(
        num_steps=LAST,
        measure=measure,
        evaluations={0, 4, LAST},
        saves={6, LAST},
        record=Record(workdir, {"rate": 1}, {"metrics": 1}) if workdir else None,
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
    assert steps == {"6", "12"}


@pytest.mark.parametrize("at", [0, 5, 7, 10])
def test_a_run_that_fails_goes_on_to_the_same_end(tmp_path, at, capsys):
    whole = fit(start(), Sums(), feed, make_plan(tmp_path / "whole"))
    with pytest.raises(ZeroDivisionError):
        fit(start(), Sums(fail_at=at), feed, make_plan(tmp_path / "run"))
    resumed = fit(start(), Sums(), feed, make_plan(tmp_path / "run"))
    going_on = f"Going on from the checkpoint of step 6 in {tmp_path / 'run'}."
    assert (going_on in capsys.readouterr().out) == (at >= 6)
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


def test_a_signal_saves_and_stops(tmp_path, monkeypatch):
    import contextlib

    @contextlib.contextmanager
    def watch(first):
        yield lambda step: step == 5

    monkeypatch.setattr(loop.preemption, "watch", watch)
    with pytest.raises(PreemptedError, match="goes on from step 5"):
        fit(start(), Sums(), feed, make_plan(tmp_path))
    monkeypatch.undo()
    step = Sums()
    fit(start(), step, feed, make_plan(tmp_path))
    assert step.calls[0][0] == 5


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
