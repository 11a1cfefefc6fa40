"""Reasons to end a run early: signals, and metrics that are not finite."""

import os
import signal

import pytest

from vit_jax.training.guard import Diverged, Guard


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_second_signal_has_its_usual_effect(number):
    def usual(*_):
        raise KeyboardInterrupt

    before = signal.signal(number, usual)
    try:
        with Guard() as guard:
            os.kill(os.getpid(), number)
            assert guard.stop and guard.signal == number
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), number)
    finally:
        signal.signal(number, before)


def test_ignored_signal_stays_ignored():
    """As `nohup` and shells that start background jobs set it."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Guard() as guard:
            os.kill(os.getpid(), signal.SIGINT)
            assert not guard.stop
    finally:
        signal.signal(signal.SIGINT, before)


def test_metric_that_is_not_finite_is_left_out_of_the_last_line():
    Guard.check(3, {"train/loss": 1.0})
    with pytest.raises(Diverged, match=r"test/loss of step 3 is inf: training has diverged\. Lower") as raised:
        Guard.check(3, {"train/loss": 1.0, "test/loss": float("inf")})
    assert raised.value.line == {"step": 3, "train/loss": 1.0, "diverged": str(raised.value)}
