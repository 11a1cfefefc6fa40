"""What survives a kill: the states of a run by Orbax, its weights as npz, its configuration.

A saved state holds the best parameters it knows of beside its own, so the two can never part: there is no moment at which
the newest state refers to a best that is not there. Every leaf carries a SHA-256, for Orbax does not notice flipped bits.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.checkpoints.google import save_npz
from vit_jax.config import AUTO, Config, difference, from_json, to_json
from vit_jax.errors import ConfigError, TrainingError
from vit_jax.files import whole_file
from vit_jax.training.state import TrainState

_log = logging.getLogger("vit_jax")
_CUT_OFF = re.compile(r"\.lock|\.config\.json\.\d+\.tmp")  # what a start that was cut off at once has left


def check(workdir: Path, config: Config) -> Config:
    """The configuration, with what it leaves open as the run in the folder has settled it.

    ConfigError where a folder is not this configuration's: they may differ in `run` alone, and the fields are named.
    """
    path = workdir / "config.json"
    if path.exists():
        there = from_json(path.read_text(errors="replace"), str(path))
        if names := difference(config, there):
            raise ConfigError(
                f"{workdir} holds a run of another configuration; these fields differ: {', '.join(names)}. "
                "Name another --workdir, or set the fields back"
            )
        settled = {name: getattr(there.model, name) for name in ("dtype", "attention") if getattr(config.model, name) == AUTO}
        return dataclasses.replace(config, model=dataclasses.replace(config.model, **settled))
    elif workdir.exists() and not (workdir.is_dir() and all(_CUT_OFF.fullmatch(p.name) for p in workdir.iterdir())):
        raise ConfigError(f"{workdir} holds something else than a run; name another --workdir")
    return config


@contextlib.contextmanager
def claim(workdir: Path, config: Config) -> Iterator[None]:
    """Makes the folder this run's and keeps every other process out of it; raises as `check`, and where it cannot be."""
    check(workdir, config)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = open(workdir / ".lock", "w")  # noqa: SIM115 (a lock lives as long as its file is open, whatever kills us)
    except OSError as error:
        raise ConfigError(f"{workdir} cannot be written: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"another process trains in {workdir}; wait for it or name another --workdir") from None
        with whole_file(workdir / "config.json") as file:
            file.write(to_json(config).encode())
        yield


def record(workdir: Path, devices: str) -> None:
    """Writes environment.json: the versions and devices of this start of the run, for whoever reads its figures."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "numpy")}
    text = json.dumps({"python": platform.python_version(), **versions, "devices": devices}, indent=2, ensure_ascii=False)
    with whole_file(workdir / "environment.json") as file:
        file.write(text.encode() + b"\n")


def _flat(tree: Any) -> dict[str, np.ndarray]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _digest(leaf: np.ndarray) -> str:
    return hashlib.sha256(str((leaf.dtype, leaf.shape)).encode() + np.ascontiguousarray(leaf).tobytes()).hexdigest()


@jax.jit
def _copy(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


class Saver:
    """Keeps the two newest states of a run and the best parameters; writes best.npz and final.npz.

    `best` is {"step", "accuracy"} of the best evaluation so far, or None; its parameters stay in memory between saves.
    `meta` is what the JSON beside an npz says of it.
    """

    def __init__(self, workdir: Path, meta: dict[str, Any], read_only: bool = False):
        import orbax.checkpoint as ocp

        self._ocp, self._workdir, self._meta, self._read_only = ocp, workdir, meta, read_only
        self._folder = workdir.absolute() / "checkpoints"
        self.best: dict[str, float] | None = None
        self._written: float | None = None  # the step of the parameters in best.npz, as far as this process knows
        self._best_params: Any = None
        self._manager = self._open()

    def _open(self) -> Any:
        # A reader beside a running training must not clean up what that one is about to finish.
        options = self._ocp.CheckpointManagerOptions(
            max_to_keep=2, cleanup_tmp_directories=not self._read_only, read_only=self._read_only, create=not self._read_only
        )
        return self._ocp.CheckpointManager(self._folder, options=options, item_names=("state", "best", "record"))

    def restore(self, abstract: TrainState) -> TrainState | None:
        """The newest state that is whole, on the host, of the structure, shapes and types of `abstract`; None if there is none.

        A damaged state is set aside for the one before it, and that is said. TrainingError where all are damaged; what the
        machine refuses (permission, too many open files) is raised as the OSError it is.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for number, step in enumerate(steps):
            try:
                state = self._read(step, abstract)
            except Exception as error:  # whatever a damaged file makes Orbax, TensorStore or JSON raise
                if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
                    raise
                reason = str(error).strip().splitlines() or [type(error).__name__]
                _log.warning("the state of step %d is damaged (%s)", step, reason[0][:200])
                continue
            if number and not self._read_only:
                self._manager.close()
                for damaged in steps[:number]:  # out of the way, for Orbax saves no step that it already has
                    os.replace(self._folder / str(damaged), self._folder / f"damaged-{damaged}-{time.time_ns()}")
                self._manager = self._open()
            return state
        if steps:
            raise TrainingError(
                f"no state in {self._folder} can be read; move the working directory away to start from the beginning"
            )
        return None

    def _read(self, step: int, abstract: TrainState) -> TrainState:
        args = self._ocp.args
        record = self._manager.restore(step, args=args.Composite(record=args.JsonRestore())).record

        def tree(item: str, like: Any) -> Any:
            wanted = _flat(like)
            as_numpy = {name: self._ocp.RestoreArgs(restore_type=np.ndarray) for name in wanted}
            restore = args.PyTreeRestore(dict.fromkeys(wanted, 0), restore_args=as_numpy)
            found = self._manager.restore(step, args=args.Composite(**{item: restore}))[item]
            for name, leaf in wanted.items():
                if (found[name].dtype, found[name].shape) != (leaf.dtype, leaf.shape):
                    raise ValueError(f"{name} is {found[name].dtype} {found[name].shape}, not {leaf.dtype} {leaf.shape}")
                if _digest(found[name]) != record["sha256"][item][name]:
                    raise ValueError(f"{name} is not what was saved")
            return jax.tree.unflatten(jax.tree.structure(like), [found[name] for name in wanted])

        state = tree("state", abstract)
        best = record["best"]
        if best is not None:
            self._best_params = tree("best", abstract.params) if "best" in record["sha256"] else state.params
        self.best = best
        return state

    def keep(self, step: int, accuracy: float, params: Any) -> None:
        """Takes note of an evaluation of `params`; they are copied where they are the best so far."""
        if self.best is None or accuracy > self.best["accuracy"]:
            # A copy where they lie, for the next step uses up the original; it reaches the host at the next save.
            self.best, self._best_params = {"step": step, "accuracy": accuracy}, _copy(params)

    def save(self, state: TrainState) -> None:
        """Begins to save a state that is on the host; returns before it is durable. best.npz is renewed where it is new."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        if self.best is not None:
            self._best_params = jax.device_get(self._best_params)
        items = {"state": _flat(state)}
        if self.best is not None and self.best["step"] != step:
            items["best"] = _flat(self._best_params)
        digests = {item: {name: _digest(leaf) for name, leaf in flat.items()} for item, flat in items.items()}
        args = self._ocp.args
        saved = {item: args.PyTreeSave(flat) for item, flat in items.items()}
        record = args.JsonSave({"sha256": digests, "best": self.best})
        try:
            self._write_best()
            self._manager.save(step, args=args.Composite(**saved, record=record))
        except Exception as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> TrainingError:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        return TrainingError(
            f"saving in {self._workdir} failed ({reason}). The states saved before are as they were; free some space and "
            "give the same command again to go on from the last one"
        )

    def _write_best(self) -> None:
        if self.best is not None and self._written != self.best["step"]:
            save_npz(self._workdir / "best.npz", self._best_params, {**self._meta, **self.best})
            self._written = self.best["step"]

    def export(self, state: TrainState, accuracy: float) -> None:
        """Writes best.npz and final.npz once every state is durable; what fails is raised as TrainingError."""
        self.wait()
        try:
            self._write_best()
            save_npz(self._workdir / "final.npz", state.params, {**self._meta, "step": int(state.step), "accuracy": accuracy})
        except OSError as error:
            raise self._failed(error) from error

    def wait(self) -> None:
        """Returns when what was saved is durable; TrainingError where it could not be."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failed(error) from error

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._manager.close()
        except Exception as failure:
            if error is None:
                raise self._failed(failure) from failure
