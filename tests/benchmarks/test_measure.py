"""Timing, with contestants whose times are known."""

import math
import sys

import numpy as np
import pytest

from benchmarks.measure import Process, enough, estimate, interleave, ratio, repeated
from vit_jax.errors import UserError


class Fake:
    """A contestant that takes `seconds` a unit, times a factor that the machine's load gives, and records its turns."""

    def __init__(self, name, seconds, turns, load=lambda turn: 1.0):
        self.name, self.seconds, self.turns, self.load = name, seconds, turns, load

    def __call__(self, n):
        self.turns.append((self.name, n))
        return n * self.seconds * self.load(len(self.turns))


def test_every_contestant_runs_once_a_round_in_an_order_that_turns():
    turns = []
    timings, failures = interleave({name: Fake(name, 1.0, turns) for name in "abc"}, rounds=4, warmup=2)
    assert "".join(name for name, _ in turns) == "aabbcc" + "abc" + "bca" + "cab" + "abc"
    assert failures == {} and all(seconds == [1.0] * 4 for seconds in timings.values())


def test_ratio_does_not_depend_on_the_load_of_the_machine():
    turns = []

    def load(turn):  # a machine that gets slower by a tenth in each round
        return 1 + 0.1 * (turn // 2)

    timings, _ = interleave({"ours": Fake("a", 0.2, turns, load), "other": Fake("b", 0.3, turns, load)}, 9)
    found = ratio(timings["ours"], timings["other"])
    assert found["low"] <= 1.5 <= found["high"]
    assert abs(found["median"] - 1.5) < 0.1  # the ratio of the unpaired medians is no nearer


def test_turn_lasts_as_long_as_asked():
    turns = []
    timings, _ = interleave({"a": Fake("a", 0.004, turns), "b": Fake("b", 0.7, turns)}, 3, least=0.5)
    assert set(turns[-2:]) == {("a", 125), ("b", 1)}
    assert timings["a"] == pytest.approx([0.004] * 3)
    assert enough(lambda n: 0.0 if n < 8 else 1.0, 0.5) == 8  # a clock that is too coarse for a few units


@pytest.mark.parametrize(("n", "left"), [(5, 0), (6, 0), (7, 0), (9, 1), (21, 5), (100, 39)])
def test_interval_is_that_of_order_statistics(n, left):
    found = estimate([float(value) for value in reversed(range(n))])
    assert (found["low"], found["high"]) == (left, n - 1 - left)
    assert found["coverage"] >= 0.95 or n < 6
    assert found["coverage"] == pytest.approx(1 - 2 * sum(math.comb(n, k) for k in range(left + 1)) / 2**n)


def test_interval_covers_the_median():
    draw = np.random.default_rng(0)
    found = [estimate(draw.exponential(size=9).tolist()) for _ in range(2000)]
    covered = np.mean([one["low"] <= math.log(2) <= one["high"] for one in found])
    assert covered == pytest.approx(found[0]["coverage"], abs=0.015) and found[0]["coverage"] > 0.95


def test_contestant_that_fails_is_left_out_and_the_others_continue(capsys):
    def ends(n, left=[4]):  # noqa: B006 (it remembers)
        left[0] -= 1
        if left[0] < 0:
            raise UserError("it has ended")
        return 1.0

    timings, failures = interleave({"a": lambda n: 1.0, "b": ends, "c": lambda n: 2.0}, 5)
    assert failures == {"b": "it has ended"} and timings == {"a": [1.0] * 5, "c": [2.0] * 5}
    assert "b failed: it has ended" in capsys.readouterr().err


def test_repeated_runs_its_unit_n_times():
    done = []
    assert 0 <= repeated(lambda: done.append(1))(3) < 1 and done == [1, 1, 1]


def script(*lines):
    return [sys.executable, "-c", "import json, os, sys, time\n" + "\n".join(lines)]


ANSWERS = "for line in sys.stdin: print(json.dumps({'seconds': 0.5 * int(line)}), flush=True)"


def test_process_answers():
    process = Process("it", script(ANSWERS))
    assert process(3) == 1.5 and process(2) == 1.0
    process.close()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["sys.exit('nothing to see')"], "it ended with status 1: nothing to see"),
        (["os.kill(os.getpid(), 9)"], "it ended with status -9: it printed no error"),
        (["input()", "raise RuntimeError('out of memory')"], "it ended with status 1: RuntimeError: out of memory"),
        (["input()", "print(json.dumps({'seconds': 1.0}), flush=True)", "input(); os._exit(7)"], "ended with status 7"),
    ],
)
def test_process_that_ends_reports_its_error(lines, message):
    process = Process("it", script(*lines))
    with pytest.raises(UserError, match=message):
        for _ in range(3):
            process(1)
    process.close()
