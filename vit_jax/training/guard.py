"""Signals, metrics that are not finite, and a watchdog: what ends a run, takes it back, or reports it."""

import contextlib
import faulthandler
import itertools
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Generator
from types import FrameType, TracebackType
from typing import Any

import jax

from vit_jax.config import Config
from vit_jax.errors import TrainingError
from vit_jax.training import hosts

_log = logging.getLogger("vit_jax")
MAX_SKIPPED_BATCHES = 3  # of a run with training.on_nan=rollback


class Diverged(TrainingError):
    """A loss, gradient norm or metric that is not finite.

    Attributes:
      line: the line of metrics.jsonl: the step, its finite metrics, and the message under "diverged".
    """

    def __init__(self, step: int, metrics: dict[str, float], message: str):
        super().__init__(message)
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        self.line: dict[str, Any] = {"step": step, **finite, "diverged": message}


class Interrupted(Exception):
    """Raised within an evaluation that a signal ends."""


class _Rollback(Exception):
    """Raised to start again from the newest state, without the batch of a step."""


def check(step: int, metrics: dict[str, float], advice: str = "") -> None:
    """Raises Diverged if a metric of a step is not finite; `advice` is added to the usual one."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            labels = {"train/learning_rate": "learning rate", "train/gradient_norm": "gradient norm"}
            context = ", ".join(f"{label} {metrics[other]:.4g}" for other, label in labels.items() if other in metrics)
            raise Diverged(
                step,
                metrics,
                f"{name} of step {step} is {value}{context and f' ({context})'}: training has diverged, and the states saved "
                "before are kept. In a new working directory, lower optimizer.learning_rate, lengthen optimizer.warmup_steps "
                f"or set optimizer.clip_norm{advice}",
            )


class Guard:
    """What a run does about signals, metrics that are not finite, and steps that do not finish.

    After the first SIGINT or SIGTERM `stops` is true, so that the loop saves and ends; a second signal has its usual effect.
    An evaluation ends at its next batch, and the next start makes it: schedulers may kill a process half a minute later.

    Attributes:
      signal: the number of the signal that arrived; 0 before one does.
      interrupted: whether it ended an evaluation.
      skipped: the step of each batch that was skipped, once more if the batch in its place was skipped, too. Every saved
        state records it.
    """

    def __init__(self, config: Config) -> None:
        self.signal = 0
        self.interrupted = False
        self.skipped: list[int] = []
        self._on_nan = config.training.on_nan
        self._before: dict[int, Any] = {}
        self._limit = config.run.watchdog_minutes * 60
        self._finished: tuple[int | None, float] = (None, time.monotonic())  # the last step of this start, and when it was read
        self._ended = threading.Event()
        self._agreement = hosts.Agreement()

    def stops(self, step: int) -> bool:
        """Whether a signal, to this host or another one, asks the run to save and end after a step (see hosts.Agreement)."""
        agreed = self._agreement.signal(step, self.signal)
        self.signal = self.signal or agreed
        return agreed != 0

    def interruptible(self, predict: Callable[..., Any]) -> Callable[..., Any]:
        """The predictor of a run, which raises Interrupted if a signal has arrived.

        Only on one host: a signal may reach one of several, which the others would wait for. There an evaluation is finished.
        """

        def predicted(*arguments: Any) -> Any:
            if self.signal and jax.process_count() == 1:
                self.interrupted = True
                raise Interrupted
            return predict(*arguments)

        return predicted

    def step_finished(self, step: int, line: dict[str, float]) -> None:
        """Takes the metrics of a step; adds how many batches were skipped there.

        Raises:
          Diverged: if a metric is not finite, unless `training.on_nan` says to go back.
        """
        self._finished = (step, time.monotonic())
        rolls_back = self._on_nan == "rollback"
        limit = f"; {MAX_SKIPPED_BATCHES} batches were skipped, and no run skips more"
        skip = "; or give this command again with --config.training.on_nan=rollback, which skips such batches"
        try:
            check(step, line, limit if rolls_back else skip)
        except Diverged as error:
            if not rolls_back or len(self.skipped) == MAX_SKIPPED_BATCHES:
                raise
            self.skipped.append(step)
            reason = str(error).partition(": ")[0]
            raise _Rollback(f"{reason}: its batch is skipped ({len(self.skipped)} of at most {MAX_SKIPPED_BATCHES})") from None
        if count := self.skipped.count(step):
            line["train/skipped_batches"] = count

    def attempt(self, train: Callable[[], Any]) -> Any:
        """The result of `train`, which is called again, to resume from the newest state, after a batch that is to be skipped.

        The batches after it move up. Thus the parameters do not depend on the state that training goes back to, and a run
        that is killed meanwhile finds the same batches again.
        """
        while True:
            try:
                return train()
            except _Rollback as rollback:
                _log.warning("%s; training goes on from the newest state, or from the beginning", rollback)

    def batches(self, feed: Callable[[int], Generator[Any]], start: int) -> Generator[Any]:
        """The batches of the steps after `start`; `feed` gives all batches from a number on."""
        with contextlib.closing(feed(start + sum(step <= start for step in self.skipped))) as found:
            for step in itertools.count(start + 1):
                for _ in range(self.skipped.count(step)):
                    next(found)
                yield next(found)

    def _watch(self) -> None:
        """Reports once when no step has finished for the time of `run.watchdog_minutes`, and again after a later step."""
        reported = None
        while not self._ended.wait(min(self._limit / 10, 10)):
            if self._finished != reported and time.monotonic() - self._finished[1] > self._limit:
                reported = self._finished
                step, wait = reported[0], "compiling and reading the data can take that long"
                _log.warning(
                    "no step has finished in the last %g minutes (%s); the run goes on. What each thread does now:",
                    self._limit / 60,
                    wait if step is None else f"the last was step {step}; an evaluation or a slow disk can take that long",
                )
                faulthandler.dump_traceback(2)  # standard error itself: tests and notebooks replace sys.stderr

    def _received(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __enter__(self) -> "Guard":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                # Ignored, as `nohup` and shells that start background jobs set it, or handled by a library in C.
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._received)
        if self._limit:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        self._restore()
