"""What may end a run early: a signal, a loss that is not finite."""

import math
import signal
import threading
from types import FrameType, TracebackType

from vit_jax.errors import TrainingError


class Guard:
    """Turns the first SIGINT or SIGTERM into `stop`, so that the loop saves and leaves; the second one ends at once."""

    def __init__(self) -> None:
        self.stop = False
        self.signal = 0  # the number of the signal that arrived
        self._before: dict[int, object] = {}

    def _received(self, number: int, frame: FrameType | None) -> None:
        self.stop, self.signal = True, number
        signal.signal(number, self._before[number])  # type: ignore[arg-type]

    def __enter__(self) -> "Guard":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._received)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    @staticmethod
    def check(step: int, metrics: dict[str, float]) -> None:
        """TrainingError where a metric of a step is not finite."""
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise TrainingError(
                    f"{name} of step {step} is {value}: training has diverged. Lower optimizer.learning_rate, lengthen "
                    "optimizer.warmup_steps or set optimizer.clip_norm, and start in a new working directory"
                )
