"""The log of a run: metrics.jsonl, TensorBoard events, a progress bar."""

import collections
import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from vit_jax.errors import printable, reason
from vit_jax.files import whole_file
from vit_jax.metrics import FILE, read
from vit_jax.training import hosts
from vit_jax.training.guard import Diverged

# Metrics of the progress bar: name in metrics.jsonl → format, short name.
_SHOWN = {
    "train/loss": ("{:.3f}", "loss"),
    "train/learning_rate": ("{:.2g}", "lr"),
    "train/images_per_second": ("{:.0f}", "img/s"),
    "validation/accuracy": ("{:.2%}", "validation"),
    "test/accuracy": ("{:.2%}", "test"),
}


def gaps(workdir: Path, found: set[int], start: int, steps: int) -> Iterator[str]:
    """Messages of a start at step `start`: whether it resumes, and what is missing in the folder.

    Args:
      workdir: the run's working directory.
      found: the steps that had a line in metrics.jsonl when the process started.
      start: the step of the restored state; 0 if there is none.
      steps: of the whole run.
    """
    if start:
        yield f"resuming from step {start} of {steps} in {workdir}"
        if missing := set(range(1, start + 1)) - found:
            yield f"{workdir / FILE} does not hold the lines of {len(missing)} of the steps up to {start}: they are lost"
    elif found:
        yield f"{workdir} holds no saved state, although {FILE} reaches step {max(found)}: starting from the beginning"


def say(text: str) -> None:
    """Prints a line on standard error of host 0, before there is a progress bar."""
    if hosts.is_first():
        print(printable(text), file=sys.stderr, flush=True)


class Journal:
    """Writes one line a step. Opened at step `start`, it drops what an earlier start wrote past that step.

    With `unfinished`, the line of that step is written again, because its evaluation is still to be made.
    On a full disk, lines of metrics.jsonl wait in memory, and TensorBoard gets no more events from this start.
    """

    def __init__(self, workdir: Path, start: int, steps: int, unfinished: bool = False):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog
        from tqdm import tqdm
        from tqdm.contrib.logging import logging_redirect_tqdm

        found, path = read(workdir), workdir / FILE
        self._workdir, self._start, self._steps = workdir, start, steps
        # The steps that earlier starts wrote lines of.
        self._found = {int(line["step"]) for line in found} | ({start} if unfinished else set())
        with whole_file(path) as file:
            file.write("".join(json.dumps(line) + "\n" for line in found if line["step"] <= start - unfinished).encode())
        self._closing = contextlib.ExitStack()
        self._file = self._closing.enter_context(path.open("ab", buffering=0))
        self._waiting: collections.deque[bytes] = collections.deque()  # lines that are not in the file
        self._full = False  # whether the user was told that they wait
        # Not SummaryWriter: a full disk ends its thread, and the next write then waits for ever.
        (workdir / "tensorboard").mkdir(exist_ok=True)
        self._board: Any = EventsWriter(str(workdir / "tensorboard" / "events"), f".{time.time_ns()}")
        self._closing.callback(lambda: self._on_board("close"))
        self._bar = tqdm(
            total=steps,
            initial=start,
            unit="step",
            file=sys.stderr,
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 10,  # a log file needs fewer lines
            smoothing=0.05,
        )
        self._closing.callback(self._bar.close)
        self._closing.enter_context(logging_redirect_tqdm())  # warnings get lines of their own
        # TensorBoard drops the events from there on.
        self._event(start + 1 - unfinished, session_log=SessionLog(status=SessionLog.START))
        self._shown: dict[str, str] = {}

    def _event(self, step: int, **content: object) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._on_board("write_event", Event(wall_time=time.time(), step=step, **content))

    def _on_board(self, operation: str, *arguments: object) -> None:
        try:
            if self._board:
                getattr(self._board, operation)(*arguments)
        except OSError as error:  # which may have cut an event short: no reader gets past that
            with contextlib.suppress(OSError):
                self._board._py_recordio_writer.close()  # the public function fails before it closes the file
            self._board = None
            self.say(f"TensorBoard gets no more events from this start ({reason(error)})")

    def _append(self) -> None:
        """Writes the waiting lines to metrics.jsonl, each of them whole or not at all; raises OSError."""
        while self._waiting:
            end, rest = self._file.tell(), self._waiting[0]
            try:
                while rest:
                    rest = rest[self._file.write(rest) :]
            except OSError as error:
                with contextlib.suppress(OSError):
                    self._file.truncate(end)
                    self._file.seek(end)
                raise OSError(error.errno, error.strerror, str(self._workdir / FILE)) from None
            self._waiting.popleft()

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """One step's line, {"step": …} and `metrics`; the bar moves to that step."""
        from tensorboardX.proto.summary_pb2 import Summary

        self._waiting.append(json.dumps({"step": step, **metrics}).encode() + b"\n")
        try:
            self._append()
        except OSError as error:
            if not self._full:
                self.say(f"{error.filename} cannot be written ({reason(error)}): its lines wait in memory")
        self._full = bool(self._waiting)
        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._event(step, summary=Summary(value=values))
        self._shown |= {name: _SHOWN[name][0].format(value) for name, value in metrics.items() if name in _SHOWN}
        self._bar.set_postfix({_SHOWN[n][1]: self._shown[n] for n in _SHOWN if n in self._shown}, refresh=False)
        self._bar.update(step - self._bar.n)

    def flush(self) -> None:
        """Makes every line written so far durable; raises OSError if metrics.jsonl cannot be written."""
        self._on_board("flush")
        self._append()
        os.fsync(self._file.fileno())

    def say(self, text: str) -> None:
        """Prints a line above the progress bar."""
        self._bar.write(printable(text), file=sys.stderr)

    def __enter__(self) -> "Journal":
        for text in gaps(self._workdir, self._found, self._start, self._steps):
            self.say(text)
        if self._start < self._steps:
            self.say("compiling the training step; the first step takes longer than the others")
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if isinstance(error, Diverged):
                self._waiting.append(json.dumps(error.line).encode() + b"\n")
            with self._closing:
                self._append()
        except OSError:  # mostly a full disk; an error that is already raised says more
            if error is None:
                raise


class _Silent(Journal):
    """The log on the other hosts: it writes nothing."""

    def __init__(self) -> None:
        pass

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Does nothing."""

    def flush(self) -> None:
        """Does nothing."""

    def say(self, text: str) -> None:
        """Does nothing."""

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass


def open_journal(workdir: Path, start: int, steps: int, unfinished: bool = False) -> Journal:
    """The log of a run on this host: only host 0 writes one."""
    return Journal(workdir, start, steps, unfinished) if hosts.is_first() else _Silent()
