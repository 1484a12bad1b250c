import os
import signal

import jax
import pytest
from jax.experimental import multihost_utils

from experiments.distributed import preemption
from experiments.distributed.preemption import PreemptedError


def test_sigterm_is_reported_while_watched_and_only_then():
    earlier = signal.getsignal(signal.SIGTERM)
    with preemption.watch(0) as must_stop:
        assert not must_stop(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert must_stop(2)
        assert must_stop(3)
    assert signal.getsignal(signal.SIGTERM) == earlier
    with preemption.watch(0) as must_stop:
        assert not must_stop(1)


def test_the_signal_is_given_back_after_an_error():
    earlier = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyError), preemption.watch(0):
        raise KeyError
    assert signal.getsignal(signal.SIGTERM) == earlier


def test_sigterm_outside_of_training():
    earlier = signal.getsignal(signal.SIGTERM)
    try:
        preemption.raise_on_sigterm()
        with pytest.raises(PreemptedError, match="stopped by SIGTERM"):
            os.kill(os.getpid(), signal.SIGTERM)
        with preemption.watch(0) as must_stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert must_stop(1)
    finally:
        signal.signal(signal.SIGTERM, earlier)


def test_of_several_processes_every_step_is_asked_for_once(monkeypatch):
    asked = []

    def reached(number):
        asked.append(number)
        return number == 23

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", reached)
    with preemption.watch(10) as must_stop:
        assert [must_stop(step) for step in (12, 20, 25, 26)] == [0, 0, 1, 0]
    assert asked == list(range(11, 27))
