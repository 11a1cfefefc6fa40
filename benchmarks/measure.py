"""Timing by turns: every contestant runs once a round, so that what slows the machine down slows all of them."""

import dataclasses
import functools
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# Does so many units of work and returns the seconds until the last of them is done.
Contestant = Callable[[int], float]


class ContestantError(RuntimeError):
    """A contestant that cannot go on; the message says why in one sentence."""


class Skipped(Exception):
    """What cannot be measured here; the message says why."""


@dataclasses.dataclass
class Result:
    """What a part measured: rows of figures for one of page.COLUMNS, and what else there is to say."""

    what: str
    rows: list[dict[str, Any]]
    notes: list[str] = dataclasses.field(default_factory=list)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)  # of the peers' packages


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A median, and the interval that holds the true one with probability `coverage`."""

    median: float
    low: float
    high: float
    coverage: float


@dataclasses.dataclass(frozen=True)
class Timing:
    """What a contestant took: seconds a unit of work, one figure a round, each over `units` units."""

    seconds: tuple[float, ...]
    units: int = 1

    @property
    def median(self) -> float:
        """The median round's seconds a unit."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The spread: half of the rounds lie between these."""
        if len(self.seconds) < 2:
            return self.median, self.median
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high


def estimate(values: Sequence[float], level: float = 0.95) -> Estimate:
    """The median of independent values with the narrowest interval of order statistics that covers `level`.

    Exact for any distribution, and wider than need be for a kind one; with fewer than six values it is their range, and
    `coverage` says how little that covers.
    """
    ordered, n = sorted(values), len(values)

    def coverage(left: int) -> float:  # of the interval that leaves out `left` values at each end
        return 1 - 2 * sum(math.comb(n, k) for k in range(left + 1)) / 2**n

    left = max((k for k in range((n + 1) // 2) if coverage(k) >= level), default=0)
    return Estimate(statistics.median(values), ordered[left], ordered[n - 1 - left], max(0.0, coverage(left)))


def ratio(first: Timing, other: Timing) -> dict[str, float]:
    """How many times as long `other` takes as `first`, round by round: above 1, `first` is faster. An Estimate, for JSON."""
    return dataclasses.asdict(estimate([b / a for a, b in zip(first.seconds, other.seconds, strict=True)]))


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


def timed(act: Callable[[int], Any]) -> Contestant:
    """A contestant of a function that returns when n units are done."""

    def run(n: int) -> float:
        began = time.perf_counter()
        act(n)
        return time.perf_counter() - began

    return run


def enough(contestant: Contestant, least: float) -> int:
    """How many units take at least `least` seconds, found by running them."""
    n = 1
    while (seconds := contestant(n)) < least:
        n = max(2 * n, math.ceil(n * least / seconds)) if seconds > 0 else 2 * n
    return n


def interleave(
    contestants: Mapping[str, Contestant],
    rounds: int,
    warmup: int = 1,
    least: float = 0.0,
    say: Callable[[str], Any] = say,
    pause: float = 0.0,
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Times every contestant once in each of `rounds` rounds, in an order that turns by one place a round.

    Before, each runs `warmup` units that do not count, and as many as it takes to know how many a round of `least` seconds
    needs. Between two turns there is a `pause`, for threads that spin a while before they sleep. A contestant that fails is
    left out of what follows, unless it is the first, with which the others are compared.

    Returns:
      (timings, failures): of those that ran to the end, and why the others did not.
    """
    names, failures = list(contestants), dict[str, str]()
    units, seconds = dict[str, int](), {name: list[float]() for name in contestants}

    def attempt(name: str, act: Callable[[], Any]) -> None:
        if name in failures:
            return
        try:
            act()
        except ContestantError as error:
            if name == names[0]:
                raise
            failures[name] = str(error)
            say(f"{name} is out: {error}")
        time.sleep(pause)

    def prepare(name: str) -> None:
        for _ in range(warmup):
            contestants[name](1)
        units[name] = enough(contestants[name], least) if least else 1

    def turn(name: str) -> None:
        seconds[name].append(contestants[name](units[name]) / units[name])

    for name in names:
        say(f"warming up {name}")
        attempt(name, functools.partial(prepare, name))
    for number in range(rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            attempt(name, functools.partial(turn, name))
        shown = ", ".join(f"{name} {1000 * seconds[name][-1]:.1f} ms" for name in names if name not in failures)
        say(f"round {number + 1} of {rounds}: {shown}")
    return {name: Timing(tuple(seconds[name]), units[name]) for name in names if name not in failures}, failures
