"""Saves the states of a run with Orbax, and its weights as npz.

A saved state holds the best parameters next to its own, so the newest state never refers to best parameters that are not
saved. `restore.py` reads the states.

One thread hashes and writes while the training goes on. Orbax writes in that thread and not in its own ones, which keep a
process waiting for minutes after a failure and report it at a later save.
"""

import concurrent.futures
import contextlib
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.config import Config
from vit_jax.errors import CheckpointError, TrainingError, reason
from vit_jax.files import BEST_WEIGHTS, FINAL_WEIGHTS
from vit_jax.formats.google import read_meta, read_npz, save_npz
from vit_jax.training import hosts, restore, tuning
from vit_jax.training.restore import Saved
from vit_jax.training.state import TrainState

_log = logging.getLogger("vit_jax")
_KEPT = 2  # states
_REPLACED = "replaced-"  # the name of a state while the one that replaces it is written, before the step


@jax.jit
def _copy(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


def _same(a: Any, b: Any) -> bool:
    ours, theirs = restore.flat(a), restore.flat(b)
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)


class Saver:
    """Keeps the two newest states of a run and the best parameters; writes best.npz and final.npz.

    Attributes:
      workdir: the run's folder.
      best: {"step", "accuracy"} of the best evaluation so far, or None.
      best_params: its parameters, which stay in memory between saves.
      unfinished: the training metrics of the state's step if a signal ended its evaluation, which is then still to be made;
        else None. Every saved state records it.
    """

    def __init__(
        self,
        workdir: Path,
        meta: dict[str, Any],
        config: Config,
        skipped: list[int] | None = None,
        gather: Callable[[Any], Any] = jax.device_get,
    ):
        """Prepares to save a run.

        Args:
          workdir: the run's working directory.
          meta: the content of the JSON next to each npz; step and accuracy are added.
          config: the run's configuration, which is saved in every state.
          skipped: of guard.Guard, which is saved in every state, and takes what the restored state has.
          gather: brings parameters on the devices to the host.
        """
        self.workdir, self._meta, self._config, self._gather = workdir, meta, config, gather
        self._folder = workdir.absolute() / "checkpoints"
        self.best: dict[str, float] | None = None
        self._written: float | None = None  # the step of the parameters in best.npz, as far as this process knows
        self.best_params: Any = None
        self.unfinished: dict[str, float] | None = None
        self._replaced: int | None = None  # the step of a state that was saved before its evaluation
        self._skipped = [] if skipped is None else skipped
        self._manager: Any = None
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "saver")
        self._saving: concurrent.futures.Future[None] | None = None
        restore.ignore_late_callbacks()

    def restore(self, abstract: TrainState) -> TrainState | None:
        """The newest state that is whole, on the host; None if there is none. Raises as `restore.read_newest`.

        Damaged newer states are moved aside, because Orbax saves no step that it already has. What a
        killed process has left of old states is removed. Host 0 reads the state, and the others get it from there.
        """
        found: list[Saved] = []  # on host 0

        def read() -> dict[str, Any] | None:
            if saved := self._read(abstract):
                found.append(saved)
            return found[0].record if found else None

        record = hosts.from_first(read)
        if record is None:
            return None
        like = (abstract, None if record["best"] is None else tuning.model_tree(abstract.params))
        state, self.best_params = hosts.arrays_of_first((found[0].state, found[0].best_params) if found else like)
        self.best, self.unfinished = record["best"], record.get("unfinished")
        self._replaced = int(state.step) if self.unfinished is not None else None
        if len(there := record.get("skipped", [])) > len(self._skipped):
            self._skipped[:] = there
        return state

    def _read(self, abstract: TrainState) -> Saved | None:
        """Reads the newest state, and tidies up around it."""
        for kept in self._folder.glob(f"{_REPLACED}*"):
            self._put_back(kept)
        saved = restore.read_newest(self._folder, abstract, self._config)
        if saved is None:
            return None
        for step in saved.newer:
            os.replace(self._folder / str(step), self._folder / f"damaged-{step}-{time.time_ns()}")
        for step in restore.steps(self._folder)[_KEPT:]:
            shutil.rmtree(self._folder / str(step), ignore_errors=True)
        with self._reporting(last=True):
            self._open()  # which removes states that a killed process was writing
        return saved

    def _open(self) -> Any:
        import orbax.checkpoint as ocp

        if self._manager is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            options = ocp.CheckpointManagerOptions(
                max_to_keep=_KEPT,
                cleanup_tmp_directories=True,
                enable_async_checkpointing=False,
                create=False,  # Orbax does so only if all processes use it
                multiprocessing_options=restore.orbax_processes(),
            )
            self._manager = ocp.CheckpointManager(self._folder, options=options, item_names=("state", "best", "record"))
        return self._manager

    def update_best(self, step: int, accuracy: float, params: Any) -> None:
        """Records an evaluation of `params`, and copies them if they are the best so far."""
        if self.best is None or accuracy > self.best["accuracy"]:
            # A copy on the devices, because the next step reuses the original's memory; the next save brings it to the host.
            self.best, self.best_params = {"step": step, "accuracy": accuracy}, _copy(params)

    def finished(self, step: int) -> bool:
        """Whether training ends at a step: the last one, or the evaluation at which `training.patience` is exhausted."""
        settings = self._config.training
        if step == settings.steps:
            return True
        if not settings.patience or self.best is None or step % settings.eval_every:
            return False
        return step - self.best["step"] >= settings.patience * settings.eval_every

    def wait(self) -> None:
        """Returns when no save is under way, so that the host holds one state at a time."""
        if self._saving:
            concurrent.futures.wait([self._saving])

    def save(self, state: TrainState, flush: Callable[[], None] = lambda: None, last: bool = False) -> None:
        """Begins to save a state that is on the host, and best.npz if it is new; returns before the state is durable.

        Waits for the save before. A save that fails is logged; the states before it stay, and the next call starts afresh.

        Args:
          state: with its step.
          flush: makes durable what must not be older than the state; its errors count as those of the save.
          last: the run ends with this state. Returns when it is durable; raises TrainingError if it cannot be saved.
        """
        step = int(state.step)
        if self.best is not None:
            self.best_params = self._gather(self.best_params)
        if not hosts.is_first():
            return
        self.wait()
        if step in restore.steps(self._folder) and step != self._replaced:
            return
        with self._reporting(last, step):
            flush()
            self._saving = self._thread.submit(self._save, state, self.best, self.best_params, self.unfinished, last)
            if last:
                self._saving.result()

    def _save(self, state: TrainState, best: dict[str, float] | None, best_params: Any, unfinished: Any, last: bool) -> None:
        """Saves a state with the best parameters of its time; the work of the saver's thread."""
        import orbax.checkpoint as ocp

        step = int(state.step)
        items = {"state": restore.flat(state)}
        if best is not None and (best["step"] != step or not tuning.is_plain(self._config)):
            items["best"] = restore.flat(best_params)
        with self._reporting(last, step):
            shapes = tuning.model_tree(state.params)
            record = restore.make_record(items, best, self._config, self._meta, shapes, self._skipped, unfinished)
            saved = {item: ocp.args.PyTreeSave(leaves) for item, leaves in items.items()}
            kept = self._folder / f"{_REPLACED}{step}"
            try:
                self._write_best(best, best_params)
                if step in restore.steps(self._folder):
                    self._manager = None  # it would not save this step again
                    os.replace(self._folder / str(step), kept)
                self._open().save(step, args=ocp.args.Composite(**saved, record=ocp.args.JsonSave(record)))
            except BaseException:
                self._manager = None  # likewise
                for partial in self._folder.glob("*.orbax-checkpoint-tmp*"):
                    shutil.rmtree(partial, ignore_errors=True)
                raise
            finally:
                self._put_back(kept)

    def _put_back(self, kept: Path) -> None:
        """Removes a state that a new one of its step has replaced or, if there is none, gives it its name again."""
        if (place := self._folder / kept.name.removeprefix(_REPLACED)).is_dir():
            shutil.rmtree(kept, ignore_errors=True)
        elif kept.is_dir():
            os.replace(kept, place)

    @contextlib.contextmanager
    def _reporting(self, last: bool, step: int | None = None) -> Iterator[None]:
        """Logs an error of the block or, if the run cannot go on without it, raises it as TrainingError."""
        try:
            yield
        except TrainingError:
            raise
        except Exception as error:  # of many kinds, by Orbax and TensorStore
            what = "opening the saved states" if step is None else f"saving step {step}"
            number = re.search(r"\[OS error (\d+)", str(error))  # of TensorStore, behind many words about its layers
            saving = f"{what} in {self.workdir} failed ({os.strerror(int(number[1])) if number else reason(error, 300)})"
            if not last:
                _log.warning("%s. Earlier states are unchanged; the run goes on, and its next save tries again", saving)
                return
            raise TrainingError(
                f"{saving}. Earlier states are unchanged; give the same command again when the cause is removed"
            ) from error

    def _write_best(self, best: dict[str, float] | None, params: Any) -> None:
        if best is not None and self._written != best["step"]:
            self._write(BEST_WEIGHTS, params, best, may_be_there=self._written is None)
            self._written = best["step"]

    def _write(self, name: str, params: Any, of: dict[str, Any], may_be_there: bool) -> None:
        """Writes weights with their JSON, unless an earlier start has left both whole; reports what is damaged."""
        path, meta = self.workdir / name, {**self._meta, **of}
        if may_be_there and self._is_whole(path, params, meta):
            return
        if path.is_dir():
            raise CheckpointError(f"{path} is a folder; move it away, the run writes its weights there")
        save_npz(path, params, meta)

    def _is_whole(self, path: Path, params: Any, meta: dict[str, Any]) -> bool:
        """Whether a file and its JSON hold exactly this; reports what is damaged, and removes a damaged JSON."""
        try:
            described = read_meta(path) == meta
        except CheckpointError as error:
            _log.warning("%s; it is written again", error)
            path.with_suffix(".json").unlink()
            return False
        try:
            return path.exists() and described and _same(read_npz(path), params)
        except CheckpointError as error:
            _log.warning("%s; it is written again", error)
            return False

    def export(self, step: int, params: Any, accuracy: float) -> None:
        """Writes best.npz and final.npz, as far as they are not whole already, once the last state is durable.

        Args:
          step: the last one.
          params: what the last state yields, on the host.
          accuracy: of these on the test split.

        Raises:
          TrainingError: if they cannot be written.
        """

        def write() -> None:
            with self._reporting(last=True):
                self._write_best(self.best, self.best_params)
                self._write(FINAL_WEIGHTS, params, {"step": step, "accuracy": accuracy}, may_be_there=True)

        hosts.from_first(write)

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._thread.shutdown()  # which waits for the save that is under way
        if self._manager is not None:
            self._manager.close()
