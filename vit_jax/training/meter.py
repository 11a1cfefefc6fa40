"""The metrics of each step, read while the device already computes the next one, with the speed of the run."""

import time
from collections.abc import Callable
from typing import Any

import jax

from vit_jax.training import guard


class Meter:
    """Holds the metrics of the step that was dispatched last until they are read.

    A step's time runs from the end of the step before it, or from the last `restart`, to its own end. The first step has no
    speed, because its time includes compilation.
    """

    def __init__(
        self,
        rate: Callable[[int], float],
        batch_size: int,
        start: int,
        check: Callable[[int, dict[str, float]], None] = guard.check,
    ):
        """Prepares to measure the steps after `start`.

        Args:
          rate: the learning rate as a function of the updates made.
          batch_size: images of a step.
          start: the step of the state that training begins with.
          check: is called with each step and its metrics when they are read; raises guard.Diverged.
        """
        self._rate, self._batch_size, self._first, self._check = rate, batch_size, start + 1, check
        self._step = start
        self._metrics: dict[str, Any] | None = None
        self._ended: float | None = None
        self.restart()

    def restart(self) -> None:
        """Starts the time of the next step now, after an evaluation or a save."""
        self._began = time.perf_counter()

    def dispatched(self, step: int, metrics: dict[str, Any]) -> tuple[int, dict[str, float]] | None:
        """Takes the metrics of a step that was just dispatched; returns the line of the step before, if it is not read yet."""
        # A CPU's dispatch computes the step: then its end is now, and not when its metrics are read.
        ended = time.perf_counter() if metrics["loss"].is_ready() else None
        before = None if self._metrics is None else (self._step, self.read())
        if ended is not None and ended < self._began:  # the end of the step before was measured later than this
            ended = None
        self._step, self._metrics, self._ended = step, metrics, ended
        return before

    def read(self) -> dict[str, float]:
        """The line of the step dispatched last; waits for it. Raises what `check` raises."""
        line = {f"train/{name}": float(value) for name, value in jax.device_get(self._metrics).items()}
        line["train/learning_rate"] = self._rate(self._step - 1)
        self._check(self._step, line)
        ended = time.perf_counter() if self._ended is None else self._ended
        seconds, self._began, self._metrics = ended - self._began, ended, None
        if self._step > self._first and seconds > 0:
            line["train/images_per_second"] = self._batch_size / seconds
        return line
