"""Reasons to end a run early: a signal, or a metric that is not finite."""

import math
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from vit_jax.errors import TrainingError


class Diverged(TrainingError):
    """A loss, gradient norm or metric that is not finite.

    Attributes:
      line: the line of metrics.jsonl: the step, its finite metrics, and the message under "diverged".
    """

    def __init__(self, step: int, metrics: dict[str, float], message: str):
        super().__init__(message)
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        self.line: dict[str, Any] = {"step": step, **finite, "diverged": message}


class Guard:
    """Turns the first SIGINT or SIGTERM into `stop`, so that the loop saves and ends; a second signal has its usual effect.

    Attributes:
      signal: the number of the signal that arrived; 0 before one does.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[int, Any] = {}

    @property
    def stop(self) -> bool:
        """Whether a signal asks the run to save and end."""
        return self.signal != 0

    def _received(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __enter__(self) -> "Guard":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) != signal.SIG_IGN:  # as `nohup` and shells that start background jobs set it
                    self._before[number] = signal.signal(number, self._received)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()

    @staticmethod
    def check(step: int, metrics: dict[str, float]) -> None:
        """Raises Diverged if a metric of a step is not finite."""
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise Diverged(
                    step,
                    metrics,
                    f"{name} of step {step} is {value}: training has diverged. Lower optimizer.learning_rate, lengthen "
                    "optimizer.warmup_steps or set optimizer.clip_norm, and start in a new working directory",
                )
