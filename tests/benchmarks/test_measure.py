"""The clockwork: contestants whose times are known."""

import math

import numpy as np
import pytest

from benchmarks.measure import ContestantError, Timing, enough, estimate, interleave, ratio, timed


class Fake:
    """A contestant that takes `seconds` a unit, times what the machine is slowed down by, and keeps a diary."""

    def __init__(self, name, seconds, diary, slow=lambda turn: 1.0):
        self.name, self.seconds, self.diary, self.slow = name, seconds, diary, slow

    def __call__(self, n):
        self.diary.append((self.name, n))
        return n * self.seconds * self.slow(len(self.diary))


def quiet(text):
    pass


def test_everybody_runs_once_a_round_in_an_order_that_turns():
    diary = []
    timings, failures = interleave({name: Fake(name, 1.0, diary) for name in "abc"}, rounds=4, warmup=2, say=quiet)
    names = "".join(name for name, _ in diary)
    assert names == "aabbcc" + "abc" + "bca" + "cab" + "abc"
    assert failures == {} and all(timing.seconds == (1.0,) * 4 for timing in timings.values())


def test_known_ratios_whatever_the_machine_does_meanwhile():
    diary = []

    def slow(turn):  # a machine that gets slower by a tenth each round
        return 1 + 0.1 * (turn // 2)

    timings, _ = interleave({"ours": Fake("a", 0.2, diary, slow), "theirs": Fake("b", 0.3, diary, slow)}, 9, say=quiet)
    found = ratio(timings["ours"], timings["theirs"])
    assert found["low"] <= 1.5 <= found["high"]
    assert abs(found["median"] - 1.5) < 0.1  # of the unpaired medians it would be no nearer
    low, high = timings["ours"].quartiles
    assert min(timings["ours"].seconds) < low < timings["ours"].median < high < max(timings["ours"].seconds)


def test_a_round_lasts_as_long_as_it_should():
    diary = []
    timings, _ = interleave({"a": Fake("a", 0.004, diary), "b": Fake("b", 0.7, diary)}, 3, least=0.5, say=quiet)
    assert timings["a"].units == 125 and timings["b"].units == 1
    assert diary[-1] in (("a", 125), ("b", 1))
    assert timings["a"].median == pytest.approx(0.004)
    assert enough(lambda n: 0.0 if n < 8 else 1.0, 0.5) == 8  # a clock that is too coarse for a few


@pytest.mark.parametrize(("n", "left"), [(5, 0), (6, 0), (7, 0), (9, 1), (21, 5), (100, 39)])
def test_the_interval_is_that_of_order_statistics(n, left):
    found = estimate([float(value) for value in reversed(range(n))])
    assert (found.low, found.high) == (left, n - 1 - left)
    assert found.coverage >= 0.95 or n < 6
    assert found.coverage == pytest.approx(1 - 2 * sum(math.comb(n, k) for k in range(left + 1)) / 2**n)


def test_the_interval_covers():
    draw = np.random.default_rng(0)
    found = [estimate(draw.exponential(size=9).tolist()) for _ in range(2000)]
    covered = np.mean([one.low <= math.log(2) <= one.high for one in found])
    assert covered == pytest.approx(found[0].coverage, abs=0.015) and found[0].coverage > 0.95


def test_who_fails_is_left_out_and_the_others_go_on():
    def ends(n, left=[4]):  # noqa: B006 (it remembers)
        left[0] -= 1
        if left[0] < 0:
            raise ContestantError("it is gone")
        return 1.0

    said = []
    timings, failures = interleave({"a": lambda n: 1.0, "b": ends, "c": lambda n: 2.0}, 5, say=said.append)
    assert failures == {"b": "it is gone"} and timings.keys() == {"a", "c"} and "b is out: it is gone" in said
    assert len(timings["c"].seconds) == 5
    with pytest.raises(ContestantError, match="it is gone"):  # with whom should the others be compared?
        interleave({"b": ends, "a": lambda n: 1.0}, 5, say=quiet)


def test_a_function_becomes_a_contestant():
    done = []
    assert 0 <= timed(done.append)(3) < 1 and done == [3]
    assert Timing((2.0,)).quartiles == (2.0, 2.0)
