"""Changes measured over the same seeds as a base: means, deviations, paired differences and their intervals.

Seeds are blocks of a randomised block design: score = change + seed + noise, with noise of one variance in all cells. The
residuals of all rows with several seeds estimate that variance together, which two or three seeds of a single row cannot.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence


@dataclasses.dataclass(frozen=True)
class Summary:
    """What is known about one change; None where it is not.

    Attributes:
      scores: seed → score.
      mean, deviation: of the scores; the sample standard deviation.
      difference: mean of the differences to the base over the seeds that both have.
      error: standard error of that mean from this row's differences only.
      margin: half the width of the 95 % interval of the difference, from the noise of all rows.
    """

    scores: dict[int, float]
    mean: float | None = None
    deviation: float | None = None
    difference: float | None = None
    error: float | None = None
    margin: float | None = None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All changes, the base first.

    Attributes:
      rows: name → Summary.
      noise: standard deviation of a single run around change + seed; None if it cannot be estimated.
      freedom: its degrees of freedom.
    """

    rows: dict[str, Summary]
    noise: float | None
    freedom: int


def _probability(t: float, freedom: int) -> float:
    """The probability that |T| is below t, for Student's t; Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine, total = math.cos(angle), 0.0
    if freedom % 2:
        term = cosine
        for k in range(1, freedom - 1, 2):
            total += term
            term *= cosine**2 * (k + 1) / (k + 2)
        return 2 / math.pi * (angle + math.sin(angle) * total)
    term = 1.0
    for k in range(0, freedom, 2):
        total += term
        term *= cosine**2 * (k + 1) / (k + 2)
    return math.sin(angle) * total


def t_quantile(freedom: int, confidence: float = 0.95) -> float:
    """The t of Student's distribution that |T| is below with a probability `confidence` in (0, 1)."""
    low, high = 0.0, 1.0
    while _probability(high, freedom) < confidence:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _probability(middle, freedom) < confidence else (low, middle)
    return high


def _noise(tables: Sequence[Sequence[float]]) -> tuple[float | None, int]:
    """The standard deviation of the residuals of rows of the same seeds, and its degrees of freedom."""
    freedom = (len(tables) - 1) * (len(tables[0]) - 1) if tables else 0
    if freedom < 1:
        return None, 0
    of_seed = [statistics.fmean(column) for column in zip(*tables, strict=True)]
    overall = statistics.fmean(of_seed)
    squares = 0.0
    for table in tables:
        mean = statistics.fmean(table)
        squares += sum((score - mean - seed + overall) ** 2 for score, seed in zip(table, of_seed, strict=True))
    return math.sqrt(squares / freedom), freedom


def compare(scores: Mapping[str, Mapping[int, float]]) -> Comparison:
    """Compares changes with the base, which is the first row.

    Args:
      scores: name → seed → score. For the noise count the rows of two or more seeds, and of their seeds those that all of
        them have.

    With two such rows the interval is that of the paired t-test.
    """
    seeds = sorted({seed for row in scores.values() for seed in row})
    ordered = {name: {seed: row[seed] for seed in seeds if seed in row} for name, row in scores.items()}
    several = {name: row for name, row in ordered.items() if len(row) > 1}
    common = [seed for seed in seeds if all(seed in row for row in several.values())]
    noise, freedom = _noise([[row[seed] for seed in common] for row in several.values()])
    base = next(iter(ordered.values()))
    rows = {}
    for number, (name, row) in enumerate(ordered.items()):
        values = list(row.values())
        differences = [row[seed] - base[seed] for seed in row if seed in base] if number else []
        count = len(differences)
        rows[name] = Summary(
            row,
            statistics.fmean(values) if values else None,
            statistics.stdev(values) if len(values) > 1 else None,
            statistics.fmean(differences) if count else None,
            statistics.stdev(differences) / math.sqrt(count) if count > 1 else None,
            t_quantile(freedom) * noise * math.sqrt(2 / count) if noise is not None and count else None,
        )
    return Comparison(rows, noise, freedom)
