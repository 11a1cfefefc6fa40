"""Timing by turns: every contestant runs once a round, so that a slow moment of the machine slows all of them."""

import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from vit_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[1]  # of the repository
Contestant = Callable[[int], float]  # runs n units of work; returns the seconds until the last one is done


@dataclass
class Result:
    """Rows of figures for one of page.TABLES, notes in words, and versions of packages that ran in other processes."""

    rows: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)


def estimate(values: Sequence[float]) -> dict[str, float]:
    """The "median" of independent values and the narrowest interval of order statistics, "low" to "high", that holds it.

    "coverage" is the probability that the interval holds the true median, for every distribution. With fewer than six values
    the interval is their range, which covers less than 95 %.
    """
    ordered, n = sorted(values), len(values)

    def coverage(left: int) -> float:  # of the interval without `left` values at each end
        return 1 - 2 * sum(math.comb(n, k) for k in range(left + 1)) / 2**n

    left = max((k for k in range((n + 1) // 2) if coverage(k) >= 0.95), default=0)
    interval = dict(low=ordered[left], high=ordered[n - 1 - left], coverage=max(0.0, coverage(left)))
    return {"median": statistics.median(values), **interval}


def ratio(first: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """An estimate of the speed of `first` divided by the speed of `other`, from their seconds in each round."""
    return estimate([b / a for a, b in zip(first, other, strict=True)])


def say(text: str) -> None:
    """Prints a line of progress on standard error."""
    print(text, file=sys.stderr, flush=True)


def repeated(unit: Callable[[], Any]) -> Contestant:
    """A contestant from a function of one unit; only the result of the last unit is waited for."""

    def run(n: int) -> float:
        began = time.perf_counter()
        for _ in range(n):
            last = unit()
        jax.block_until_ready(last)
        return time.perf_counter() - began

    return run


def enough(contestant: Contestant, least: float) -> int:
    """The number of units that take at least `least` seconds, found by running them."""
    n = 1
    while (seconds := contestant(n)) < least:
        n = max(2 * n, math.ceil(n * least / seconds)) if seconds > 0 else 2 * n
    return n


def interleave(
    contestants: Mapping[str, Contestant], rounds: int, warmup: int = 1, least: float = 0.0, pause: float = 0.0
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Times every contestant once in each round. Each round begins with another contestant.

    Args:
      contestants: by name. One that raises UserError does not take part in the following rounds.
      rounds, warmup: numbers of rounds, and of units that each contestant runs first and that do not count.
      least: seconds that a turn lasts at least.
      pause: seconds between two turns, for threads that spin for a while before they sleep.

    Returns:
      (seconds, failures): seconds a unit in each round, of those that ran to the end, and why the others did not.
    """
    names, failures, units = list(contestants), dict[str, str](), dict[str, int]()
    seconds: dict[str, list[float]] = {name: [] for name in names}

    def turn(name: str) -> None:
        run = contestants[name]
        try:
            if name in units:
                seconds[name].append(run(units[name]) / units[name])
            else:
                for _ in range(warmup):
                    run(1)
                units[name] = enough(run, least) if least else 1
        except UserError as error:
            failures[name] = str(error)
            say(f"{name} failed: {error}")
        time.sleep(pause)

    for number in range(-1, rounds):  # the first is the warm-up
        start = max(0, number) % len(names)
        for name in names[start:] + names[:start]:
            if name not in failures:
                turn(name)
        shown = (f"{name} {1000 * seconds[name][-1]:.1f} ms" for name in names if seconds[name] and name not in failures)
        say(f"round {number + 1} of {rounds}: {', '.join(shown) or 'warm-up'}")
    return {name: seconds[name] for name in names if name not in failures}, failures


def environment(**more: str) -> dict[str, str]:
    """This process's variables, with the repository on Python's path, and `more`."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, **more}


class Process:
    """A contestant in its own process, driven by lines over its standard input and output (see peer_process.serve)."""

    def __init__(self, name: str, command: list[str], env: Mapping[str, str] | None = None):
        self._name, self._errors, pipe = name, tempfile.TemporaryFile(), subprocess.PIPE  # noqa: SIM115
        self._process = subprocess.Popen(command, text=True, env=env, stdin=pipe, stdout=pipe, stderr=self._errors)

    def ask(self, line: str) -> Any:
        """Sends a line and returns the answer; to "about", that is memory in bytes, device and versions."""
        assert self._process.stdin and self._process.stdout
        with contextlib.suppress(BrokenPipeError):  # the process has ended; it has no answer
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        if answer := self._process.stdout.readline():
            return json.loads(answer)
        status = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines() or ["it printed no error"]
        message = next((line for line in reversed(lines) if "error" in line.lower()), lines[-1])
        raise UserError(f"{self._name} ended with status {status}: {message[:300]}")

    def __call__(self, n: int) -> float:
        return self.ask(str(n))["seconds"]

    def close(self) -> None:
        """Ends the process."""
        try:
            self._process.communicate(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
        self._errors.close()
