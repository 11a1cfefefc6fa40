"""Reasons to end a run early or to go back, and the report about a run that stands still."""

import dataclasses
import itertools
import logging
import os
import signal
import time

import jax
import numpy as np
import pytest

from tests.training.states import same
from vit_jax import metrics as metrics_file
from vit_jax.config import Config
from vit_jax.data.batches import train_batch
from vit_jax.training import assemble, guard, loop
from vit_jax.training.feed import Feed
from vit_jax.training.guard import Diverged, Guard


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_second_signal_has_its_usual_effect(number):
    def usual(*_):
        raise KeyboardInterrupt

    before = signal.signal(number, usual)
    try:
        with Guard(Config()) as guarding:
            os.kill(os.getpid(), number)
            assert guarding.stops(1) and guarding.signal == number
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), number)
    finally:
        signal.signal(number, before)


def test_ignored_signal_stays_ignored():
    """As `nohup` and shells that start background jobs set it."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Guard(Config()) as guarding:
            os.kill(os.getpid(), signal.SIGINT)
            assert not guarding.stops(1)
    finally:
        signal.signal(signal.SIGINT, before)


def test_metric_that_is_not_finite_is_left_out_of_the_last_line():
    guard.check(3, {"train/loss": 1.0})
    with pytest.raises(Diverged, match=r"test/loss of step 3 is inf: training has diverged, .*kept\. In a new") as raised:
        guard.check(3, {"train/loss": 1.0, "test/loss": float("inf")})
    assert raised.value.line == {"step": 3, "train/loss": 1.0, "diverged": str(raised.value)}


def test_message_has_learning_rate_and_gradient_norm():
    line = {"train/loss": float("nan"), "train/gradient_norm": float("inf"), "train/learning_rate": 0.03}
    words = r"train/loss of step 3 is nan \(learning rate 0\.03, gradient norm inf\): .*"
    with pytest.raises(Diverged, match=f"{words}clip_norm; or give this command again with --config.training.on_nan=rollback"):
        Guard(Config()).step_finished(3, dict(line))
    (config := Config()).training.on_nan = "rollback"
    (exhausted := Guard(config)).skipped += [1, 1, 2]
    with pytest.raises(Diverged, match=f"{words}clip_norm; 3 batches were skipped, and no run skips more"):
        exhausted.step_finished(3, dict(line))


def test_skipped_batches_are_left_out_and_later_ones_move_up():
    guarding, closed = Guard(Config()), []

    def feed(start):
        try:
            yield from itertools.count(start)
        finally:
            closed.append(start)

    guarding.skipped = [3, 5, 3]  # of step 3, its own batch and the one that replaced it
    for start in range(6):
        batches = guarding.batches(feed, start)
        assert list(itertools.islice(batches, 6 - start)) == [0, 1, 4, 5, 7, 8][start:]
        batches.close()
    assert len(closed) == 6


@pytest.fixture
def spoilt(monkeypatch):
    """spoilt(batches): the training batches of these numbers give a loss and parameters that are not finite."""
    assemble = loop.assemble

    def spoil(numbers):
        bad = {train_batch(64, 16, 3, number).tobytes() for number in numbers}

        def assembled(*args, **kwargs):
            parts = assemble(*args, **kwargs)

            def train_step(state, batch, data):
                indices = jax.device_get(batch.index)
                state, found = parts.program.train_step(state, batch, data)
                if indices.tobytes() in bad:
                    with jax.transfer_guard("allow"):
                        state = state._replace(params=jax.tree.map(lambda leaf: leaf * np.nan, state.params))
                        found = {**found, "loss": found["loss"] * np.nan}
                return state, found

            return dataclasses.replace(parts, program=parts.program._replace(train_step=train_step))

        monkeypatch.setattr(loop, "assemble", assembled)

    return spoil


def lines(workdir):
    """A run's lines without what time it took."""
    found = metrics_file.read(workdir)
    return [{name: value for name, value in line.items() if "per_second" not in name} for line in found]


@pytest.mark.slow
def test_rollback_skips_the_batches_wherever_the_run_is_ended(config, tmp_path, spoilt, monkeypatch, caplog):
    config.training.on_nan, config.training.save_every = "rollback", 3
    spoilt([5, 6, 9])  # in order: steps 6 (twice) and 8
    expected = loop.train(config, tmp_path / "whole")
    assert expected.finished and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(expected.params))
    found = lines(tmp_path / "whole")
    assert [line["step"] for line in found] == list(range(1, 13))
    assert {line["step"]: line["train/skipped_batches"] for line in found if "train/skipped_batches" in line} == {6: 2, 8: 1}
    said = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert [text.split(" is")[0] for text in said] == [f"train/loss of step {step}" for step in (6, 6, 8)]
    assert "(3 of at most 3); training goes on from the newest state, or from the beginning" in said[2]

    original = guard.check
    for ended in (7, 10):

        def end(step, line, *advice, ended=ended):
            original(step, line, *advice)
            if step == ended:
                monkeypatch.setattr(guard, "check", original)
                os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(guard, "check", end)
        workdir = tmp_path / f"ended-{ended}"
        assert not loop.train(config, workdir).finished
        resumed = loop.train(config, workdir)
        assert same(resumed.params, expected.params) and lines(workdir) == lines(tmp_path / "whole")


def test_rollback_without_a_saved_state_begins_again_and_is_bounded(config, tmp_path, spoilt, monkeypatch):
    config.training.on_nan, config.training.save_every = "rollback", 100
    spoilt(range(2, 20))
    opened = []
    monkeypatch.setattr(assemble, "Feed", lambda *args: opened.append(args) or Feed(*args))
    with pytest.raises(Diverged, match="train/loss of step 3 is nan"):
        loop.train(config, tmp_path)
    found = metrics_file.read(tmp_path)
    assert [line["step"] for line in found] == [1, 2, 3] and "train/loss of step 3" in found[-1]["diverged"]
    assert len(opened) == 1  # the training images are read once, not at each attempt


def test_watchdog_reports_a_step_that_does_not_finish_once(caplog, capfd):
    config = Config()
    config.run.watchdog_minutes = 0.001
    with caplog.at_level(logging.WARNING), Guard(config) as guarding:

        def reports(count):
            limit = time.monotonic() + 20
            while len(caplog.messages) < count and time.monotonic() < limit:
                time.sleep(0.01)
            return len(caplog.messages)

        assert reports(1) == 1 and "(compiling and reading the data can take that long)" in caplog.text
        guarding.step_finished(7, {"train/loss": 1.0})
        assert reports(2) == 2 and "the last was step 7" in caplog.text
        time.sleep(0.2)
        assert reports(2) == 2
    assert "test_watchdog_reports" in capfd.readouterr().err  # the name of a function on the stack of a thread


def test_watchdog_of_zero_minutes_is_off(caplog):
    config = Config()
    config.run.watchdog_minutes = 0
    with Guard(config):
        time.sleep(0.1)
    assert not caplog.text


def test_handler_of_a_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(signal, "getsignal", lambda number: None)  # as for handlers that Python did not install
    with Guard(Config()) as guarding:
        assert not guarding._before
