"""Which batch fits in a memory, found by compiling as few programs as possible."""

from collections.abc import Callable

_TRIES = 3  # programs that are compiled at most; each takes half a minute
_CLOSE = 1.05  # a batch that is larger by less is not worth compiling for
_AIM = 0.97  # of the memory: a program that fits at once saves another


def round_down(size: float, unit: int) -> int:
    """The largest multiple of `unit` with at most five significant bits that is not above `size`; 0 if there is none."""
    step = unit
    while size >= 32 * step:
        step *= 2
    return int(size // step) * step


def largest_batch(
    needed: Callable[[int], float], limit: float, unit: int, known: tuple[int, float], fixed: float
) -> tuple[int, float] | None:
    """The largest multiple of `unit` that was compiled and fits, with the bytes it needs; None if none does.

    Args:
      needed: compiles the program of a batch size and returns the bytes that it needs.
      limit: bytes that there are.
      unit: of which every batch size is a multiple.
      known: a batch size and the bytes that it needs.
      fixed: the bytes that are needed at least, by an estimate.
    """
    points = {0: fixed, known[0]: known[1]}
    fits = {size: bytes_ for size, bytes_ in (known,) if bytes_ <= limit}
    for _ in range(_TRIES):
        # Memory grows almost linearly with the batch: the line through the two points that are nearest to the limit.
        (a, low), (b, high) = sorted(sorted(points.items(), key=lambda point: abs(point[1] - limit))[:2])
        if high <= low:
            break
        candidate = round_down(a + (_AIM * limit - low) * (b - a) / (high - low), unit)
        too_large = [size for size, bytes_ in points.items() if bytes_ > limit]
        if too_large and candidate >= min(too_large):
            candidate = round_down(min(too_large) - 1, unit)
        if candidate < max(unit, _CLOSE * max(fits, default=0)):
            break
        points[candidate] = needed(candidate)
        if points[candidate] <= limit:
            fits[candidate] = points[candidate]
    return max(fits.items(), default=None)
