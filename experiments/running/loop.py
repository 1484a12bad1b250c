"""The one training loop: steps, evaluations, checkpoints, reports, and the end.

Every experiment brings its states, a step, a feed and a plan, and keeps what it knows
of its networks to itself. Whatever may end a run, and whatever it leaves, is here.
"""

import contextlib
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.distributed.agreement import any_process
from experiments.distributed.processes import print_once
from experiments.distributed.progress import progress_bar
from experiments.running import stopping
from experiments.running.record import Losses, Measured, Record, States

# From the states, the number of steps done before and a piece of the feed to the new
# states and the losses of each network, (steps,) or (steps, replicas).
Step = Callable[[States, int, Any], tuple[States, Mapping[str, jax.Array]]]
# From the number of steps done to pieces, each with its number of steps. No piece goes
# beyond the next of some steps.
Feed = Callable[[int, Sequence[int]], Generator[tuple[int, Any]]]


class Plan(NamedTuple):
    """How long to train, and what to do on the way."""

    num_steps: int
    # From the steps done, the states, and the mean losses since the last look to what
    # is reported. Losses are empty before the first step.
    measure: Callable[[int, States, Losses], Measured] | None = None
    evaluations: Collection[int] = ()  # the steps after which it is called; from 0
    saves: Collection[int] = ()  # the steps after which states are saved
    record: Record | None = None  # where; None: nothing is kept
    # Steps between looks at the losses, where divergence shows, and at whether to stop.
    steps_per_look: int = 20
    # Names replica i of a network, for messages.
    name_replica: Callable[[str, int], str] = lambda network, i: f"{network}, {i}"
    stop_if_diverged: bool = False  # when no network is left that has not
    examples_per_step: int = 0  # 0: the progress bar counts steps
    shows_progress: bool = True


class Trained(NamedTuple):
    """How training ended."""

    states: States
    step: int  # steps done
    rows: dict[str, list[dict[str, Any]]]  # of each log of the record
    diverged_at: int | None  # where all networks have; None if any has not


_NO_LOSSES: Losses = {}


def fit(states: States, step: Step, feed: Feed, plan: Plan) -> Trained:
    """Trains from the newest checkpoint, or else from the start, to the last step.

    Args:
      states: before the first step, a state a network.
      step: takes one step, or many.
      feed: what the steps learn from.
      plan: what else is to be done, and when.

    Raises:
      Stopped: the run was asked to stop, and has saved what it needs to go on.
      WorkdirError, CheckpointError: as `Record.opened` and `Record.save`.
    """
    last = plan.num_steps
    evaluations = sorted({at for at in plan.evaluations if 0 <= at <= last})
    looks = range(0, last, plan.steps_per_look)
    stops = sorted({*evaluations, *plan.saves, *looks, last})
    with contextlib.ExitStack() as stack:
        # Left last, when all is on disk.
        hold = stack.enter_context(contextlib.ExitStack())
        first, unreported = 0, _NO_LOSSES if 0 in evaluations else None
        if plan.record is not None:
            first, states, unreported = stack.enter_context(
                plan.record.opened(states, evaluations)
            )
        if unreported is not None:
            _evaluate(plan, first, states, unreported)
        losses = _Losses(plan, first)
        unit = plan.examples_per_step or 1
        bar = stack.enter_context(
            progress_bar(
                last * unit,
                first * unit,
                "image" if unit > 1 else "step",
                shown=plan.shows_progress,
            )
        )
        pieces = stack.enter_context(
            contextlib.closing(feed(first, [at for at in stops if at > first]))
        )
        coming = set(stops)
        done = first
        for count, piece in pieces:
            states, found = step(states, done, piece)
            if done == first and plan.record is not None:
                # From here on there is something to lose.
                hold.enter_context(stopping.held())
            done += count
            losses.add(found)
            bar.update(count * unit)
            if done not in coming:
                continue
            means, diverged_at = losses.look(done)
            if diverged_at is not None:
                print_once(f"\nDiverged: the loss of step {diverged_at} is not finite.")
                return Trained(states, diverged_at, _rows(plan), diverged_at)
            unreported = means if done in evaluations else None
            score, stops_here = None, plan.record is not None and _is_asked()
            if unreported is not None and not stops_here:
                try:
                    with stopping.interruptible(_is_asked):
                        measured = _evaluate(plan, done, states, means)
                except stopping.Stopped:
                    stops_here = True
                else:
                    score, unreported = measured.score, None
                    bar.set_postfix(measured.shown, refresh=False)
            if plan.record is not None and (done in plan.saves or stops_here):
                plan.record.save(done, states, score, unreported)
            if stops_here:
                raise stopping.stopped()
        return Trained(states, last, _rows(plan), None)


def _is_asked() -> bool:
    """Whether to stop, in all processes alike."""
    return any_process(stopping.is_asked())


def _evaluate(plan: Plan, step: int, states: States, losses: Losses) -> Measured:
    assert plan.measure is not None
    measured = plan.measure(step, states, losses)
    if plan.record is not None:
        plan.record.report(step, measured)
    return measured


def _rows(plan: Plan) -> dict[str, list[dict[str, Any]]]:
    return {} if plan.record is None else plan.record.rows


class _Losses:
    """The losses since the last look, still on the devices."""

    def __init__(self, plan: Plan, step: int) -> None:
        self._plan, self._step = plan, step
        self._waiting: list[Mapping[str, jax.Array]] = []
        self._diverged: set[str] = set()
        # Pieces under way. On an accelerator two, so that it receives the next while it
        # computes. On CPU a queue of programs with collectives can deadlock forced host
        # devices.
        self._ahead = 0 if jax.default_backend() == "cpu" else 2

    def add(self, losses: Mapping[str, jax.Array]) -> None:
        """Takes the losses of a piece, and keeps the host from running far ahead."""
        self._waiting.append(losses)
        if len(self._waiting) > self._ahead:
            jax.block_until_ready(self._waiting[-1 - self._ahead])

    def look(self, step: int) -> tuple[dict[str, np.ndarray], int | None]:
        """The mean losses up to a step, and where all networks have diverged."""
        pieces = jax.device_get(self._waiting)
        losses = {name: np.concatenate([p[name] for p in pieces]) for name in pieces[0]}
        first, self._step, self._waiting = self._step, step, []
        with np.errstate(over="ignore", invalid="ignore"):
            means = {name: each.mean(axis=0) for name, each in losses.items()}
        if all(np.isfinite(mean).all() for mean in means.values()):
            return means, None
        if self._plan.stop_if_diverged:
            columns = [each.reshape(len(each), -1).T for each in losses.values()]
            finite = np.isfinite(np.concatenate(columns))  # (networks, steps)
            if not finite.all(axis=1).any():
                return means, first + 1 + int(finite.argmin(axis=1).max())
        self._name_diverged(means, step)
        return means, None

    def _name_diverged(self, means: Losses, step: int) -> None:
        names = {
            self._plan.name_replica(name, int(i))
            for name, mean in means.items()
            for i in np.flatnonzero(~np.isfinite(mean))
        }
        for name in sorted(names - self._diverged):
            self._diverged.add(name)
            print_once(f"\nDiverged by step {step}: {name}. The others go on.")
