"""What a run says while it goes on: metrics.jsonl, TensorBoard, a progress bar."""

import json
import os
import sys
from pathlib import Path
from types import TracebackType

FILE = "metrics.jsonl"


def read(workdir: Path, until: int | None = None) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl in order, up to step `until`; a line that a kill cut short is left out."""
    path, lines = workdir / FILE, []
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if until is None or line["step"] <= until:
            lines.append(line)
    return lines


class Journal:
    """Writes one line a step. Opened at step `start`, it drops what an earlier start wrote past that step."""

    def __init__(self, workdir: Path, start: int, steps: int):
        from tensorboardX import SummaryWriter
        from tqdm import tqdm

        kept, path = read(workdir, start), workdir / FILE
        scratch = path.with_suffix(".tmp")
        scratch.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(scratch, path)
        self._file = open(path, "a")  # noqa: SIM115 (closed by __exit__)
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=start + 1)
        self._bar = tqdm(
            total=steps,
            initial=start,
            unit="step",
            file=sys.stderr,
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 10,  # a log file needs fewer lines
            smoothing=0.05,
        )
        self._shown: dict[str, str] = {}

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """One step's line, {"step": …} and `metrics`; the bar moves to that step."""
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)
        self._shown |= {name: _SHORT[name][0].format(value) for name, value in metrics.items() if name in _SHORT}
        self._bar.set_postfix({_SHORT[n][1]: self._shown[n] for n in _SHORT if n in self._shown}, refresh=False)
        self._bar.update(step - self._bar.n)

    def flush(self) -> None:
        """Makes every line written so far durable."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def say(self, text: str) -> None:
        """A line for people, above the bar."""
        self._bar.write(text, file=sys.stderr)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.close()
        self.flush()
        self._file.close()
        self._board.close()


_SHORT = {
    "train/loss": ("{:.3f}", "loss"),
    "train/learning_rate": ("{:.2g}", "lr"),
    "train/images_per_second": ("{:.0f}", "img/s"),
    "test/accuracy": ("{:.2%}", "test"),
}
