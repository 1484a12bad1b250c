"""Times of several contestants, taken in turns so that all meet the same machine."""

import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

# On CPU every call's fresh output would cost page faults, up to several times what the
# call itself takes. So the allocator keeps what was freed. Read when a process starts.
ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
    "MALLOC_TOP_PAD_": str(1 << 30),
    "MALLOC_ARENA_MAX": "1",
}


class Timing(NamedTuple):
    """Times of one contestant, in milliseconds."""

    median: float
    low: float  # first quartile
    high: float  # third quartile
    best: float
    ratio: float  # to the first contestant, the median over rounds


def prepare(cores: int | None) -> None:
    """Readies this process: its cores, and an allocator that keeps freed memory.

    To be called before jax is imported, by a command that was started with `python -m`,
    which may be started again.

    Args:
      cores: how many of the allowed ones to run on; None for all.
    """
    if cores is not None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-cores:])
    # Torch would start more threads than that.
    os.environ["OMP_NUM_THREADS"] = str(len(os.sched_getaffinity(0)))
    if any(os.environ.get(name) != value for name, value in ALLOCATOR.items()):
        os.execve(sys.executable, sys.orig_argv, os.environ | ALLOCATOR)


def time_in_turns(
    contestants: Mapping[str, Callable[[int], Any]], rounds: int, repeats: int = 1
) -> dict[str, Timing]:
    """Times calls in turns, each round in another order.

    Args:
      contestants: called with the number of the round, so that inputs can rotate; they
        return when their work is done. All are called twice before.
      rounds: timed calls of each.
      repeats: how often a call does its work; times are of once.

    Returns:
      For each contestant its times. The ratio compares within a round, so that what
      slows the machine down for a while slows both.
    """
    names = list(contestants)
    for warm_up in range(2):
        for name in names:
            contestants[name](warm_up)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            times[name].append(elapsed(contestants[name], turn) / repeats)
    first = np.array(times[names[0]])
    return {name: timing(np.array(taken), first) for name, taken in times.items()}


def elapsed(call: Callable[[int], Any], turn: int) -> float:
    """Milliseconds that one call takes: on one core, of the processor's time."""
    # On one core, what others take of it can be told apart.
    alone = len(os.sched_getaffinity(0)) == 1
    clock = time.process_time if alone else time.perf_counter
    begin = clock()
    call(turn)
    return 1e3 * (clock() - begin)


def timing(times: np.ndarray, first: np.ndarray) -> Timing:
    """Summarises a contestant's times, beside those of the first in the same rounds."""
    low, median, high = np.percentile(times, (25, 50, 75))
    best, ratio = times.min(), np.median(times / first)
    return Timing(*(float(value) for value in (median, low, high, best, ratio)))


def geometric_mean(values: Any) -> float:
    """The geometric mean of positive numbers."""
    return float(np.exp(np.mean(np.log(np.asarray(list(values), float)))))
