"""Many runs in one folder: killed and started again, a study goes on where it was; several processes can share it."""

import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from vit_jax import metrics
from vit_jax.cli import too_little_memory
from vit_jax.config import Config, difference
from vit_jax.config_files import from_json
from vit_jax.errors import ConfigError, UserError, reason
from vit_jax.files import FINAL_WEIGHTS, locked
from vit_jax.training import loop
from vit_jax.training.command import MEMORY_ADVICE
from vit_jax.training.guard import Diverged
from vit_jax.training.workdir import Busy

_WAIT = 5.0  # seconds until a cell that another process trains is looked at again


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
      name: of its folder, below that of the study.
      config: of the run.
    """

    name: str
    config: Config


class Stopped(Exception):
    """A signal ended the study; `number` is the signal's."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def result(cell: Cell, folder: Path) -> dict[str, Any] | None:
    """The last metrics of a cell that is finished or has diverged ("diverged" says why), from its files; else None.

    Raises:
      ConfigError: if its folder holds a run of another configuration.
    """
    workdir = folder / cell.name
    lines = metrics.read(workdir)
    diverged = bool(lines) and "diverged" in lines[-1]
    if not diverged and not (workdir / FINAL_WEIGHTS).is_file():
        return None
    try:
        saved = from_json((workdir / "config.json").read_text(), str(workdir / "config.json"))
    except OSError:
        return None
    if names := difference(cell.config, saved):
        raise ConfigError(f"{workdir} holds a run with other values of {', '.join(names)}: name another --output, or remove it")
    if diverged:
        return lines[-1]
    settings = saved.training  # with the steps of training.epochs
    found = [line for line in lines if "test/accuracy" in line and (line["step"] == settings.steps or settings.patience)]
    return found[-1] if found else None


def _is_busy(workdir: Path) -> bool:
    """Whether another process trains in the folder."""
    try:
        if workdir.is_dir():
            with locked(workdir / ".lock", "", wait=False):
                pass
    except BlockingIOError:
        return True
    except OSError:  # `train` says what is wrong with it
        pass
    return False


def run(cells: Sequence[Cell], folder: Path) -> Iterator[tuple[Cell, dict[str, Any] | UserError]]:
    """Trains the cells that are not finished, and yields each with its last metrics, or with the error that ended it.

    A cell that another process trains is waited for, after all others. A loss that is not finite is a result: the metrics of
    such a cell have "diverged".

    Raises:
      Stopped: if SIGINT or SIGTERM ended a run; its state is saved.
    """
    waiting, reported = list(cells), False
    while waiting:
        busy = []
        for number, cell in enumerate(waiting, 1):
            stopped = 0
            try:
                found = result(cell, folder)
                if found is None and _is_busy(folder / cell.name):
                    busy.append(cell)
                    continue
                if found is None:
                    print(f"[{number} of {len(waiting)}] {cell.name}", file=sys.stderr, flush=True)
                    trained = loop.train(cell.config, folder / cell.name)
                    stopped, found = trained.signal, trained.metrics if trained.finished else None
                    jax.clear_caches()  # the programs of many models would fill the memory
                if found is not None:
                    yield cell, found
                if stopped:  # also if the signal arrived when the run was about to finish
                    raise Stopped(stopped)
            except Busy:
                busy.append(cell)
            except Diverged as error:
                jax.clear_caches()
                yield cell, {"diverged": str(error)}
            except Exception as error:
                if isinstance(error, UserError):
                    failure = error
                elif message := too_little_memory(error, MEMORY_ADVICE):
                    failure = UserError(message)
                else:
                    raise
                failure.__context__ = failure.__cause__ = None
                failure.with_traceback(None)  # whose frames hold the run's arrays
                jax.clear_caches()
                print(f"{cell.name}: {reason(failure, 1000)}", file=sys.stderr, flush=True)
                yield cell, failure
        if busy and not reported:
            reported = True
            print(
                f"waiting for other processes, which train {', '.join(cell.name for cell in busy)}", file=sys.stderr, flush=True
            )
        if busy:
            time.sleep(_WAIT)
        waiting = busy
