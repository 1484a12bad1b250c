import os
import signal

import pytest

from experiments import preemption
from experiments.preemption import PreemptedError


def test_sigterm_is_reported_while_watched_and_only_then():
    earlier = signal.getsignal(signal.SIGTERM)
    with preemption.watch() as must_stop:
        assert not must_stop()
        os.kill(os.getpid(), signal.SIGTERM)
        assert must_stop()
        assert must_stop()
    assert signal.getsignal(signal.SIGTERM) == earlier
    with preemption.watch() as must_stop:
        assert not must_stop()


def test_the_signal_is_given_back_after_an_error():
    earlier = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyError), preemption.watch():
        raise KeyError
    assert signal.getsignal(signal.SIGTERM) == earlier


def test_sigterm_outside_of_training():
    earlier = signal.getsignal(signal.SIGTERM)
    try:
        preemption.raise_on_sigterm()
        with pytest.raises(PreemptedError, match="stopped by SIGTERM"):
            os.kill(os.getpid(), signal.SIGTERM)
        with preemption.watch() as must_stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert must_stop()
    finally:
        signal.signal(signal.SIGTERM, earlier)
