"""What survives a kill: the states of a run by Orbax, its weights as npz, its configuration.

A saved state holds the best parameters it knows of beside its own, so the two can never part: there is no moment at which
the newest state refers to a best that is not there. Every leaf carries a SHA-256, for Orbax does not notice flipped bits.
"""

import dataclasses
import errno
import hashlib
import json
import logging
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.checkpoints.google import read_meta, read_npz, save_npz
from vit_jax.config import Config, difference, from_json
from vit_jax.errors import CheckpointError, ConfigError, TrainingError, reason
from vit_jax.training.state import TrainState

_log = logging.getLogger("vit_jax")
# What the machine refuses for reasons that have nothing to do with a state: no damage, and no reason to use an older one.
_NOT_DAMAGE = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_TRIES = 10  # of a reader whose states a training next to it replaces
_PAUSE = 0.2  # seconds between them


def _flat(tree: Any) -> dict[str, np.ndarray]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _digest(leaf: np.ndarray) -> str:
    return hashlib.sha256(str((leaf.dtype, leaf.shape)).encode() + np.ascontiguousarray(leaf).tobytes()).hexdigest()


@jax.jit
def _copy(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


def _digest_of(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _holds(path: Path, params: Any, meta: dict[str, Any]) -> bool:
    """Whether an npz and the JSON next to it are whole and hold exactly these parameters and this description."""
    try:
        found, wanted = _flat(read_npz(path)), _flat(params)
        same = found.keys() == wanted.keys() and all(np.array_equal(found[name], wanted[name]) for name in wanted)
        return same and read_meta(path) == json.loads(json.dumps(meta))
    except (CheckpointError, OSError):
        return False


class Saver:
    """Keeps the two newest states of a run and the best parameters; writes best.npz and final.npz.

    `best` is {"step", "accuracy"} of the best evaluation so far, or None; its parameters stay in memory between saves.
    `meta` is what the JSON next to an npz says of it; a restored state brings the one that its run began with. A state
    also carries `config`, which a later start must have.
    """

    def __init__(self, workdir: Path, meta: dict[str, Any], config: Config | None = None, read_only: bool = False):
        import orbax.checkpoint as ocp

        self._ocp, self._workdir, self._meta, self._read_only = ocp, workdir, meta, read_only
        self._config = config
        self._folder = workdir.absolute() / "checkpoints"
        self.best: dict[str, float] | None = None
        self._written: float | None = None  # the step of the parameters in best.npz, as far as this process knows
        self._best_params: Any = None
        self._broken = False  # a save has failed, and closing Orbax's manager would wait for it
        self._manager = self._open()

    def _open(self) -> Any:
        # A reader next to a running training must not clean up what that one is about to finish.
        options = self._ocp.CheckpointManagerOptions(
            max_to_keep=2, cleanup_tmp_directories=not self._read_only, read_only=self._read_only, create=not self._read_only
        )
        try:
            return self._ocp.CheckpointManager(self._folder, options=options, item_names=("state", "best", "record"))
        except OSError as error:
            raise self._failed(error) from error

    def restore(self, abstract: TrainState) -> TrainState | None:
        """The newest state that is whole, on the host, of the structure, shapes and types of `abstract`; None if there is none.

        A damaged state is set aside for the one before it, and that is logged. A reader (`read_only`) changes nothing, and
        tries again if a training next to it has replaced the states meanwhile.

        Raises:
          ConfigError: if the state was trained with another configuration.
          TrainingError: if all states are damaged.
          OSError: what the machine refuses, such as permission or too many open files.
        """
        for attempt in range(_TRIES if self._read_only else 1):
            if attempt:
                time.sleep(_PAUSE)
                self._manager.close()
                self._manager = self._open()
            steps = sorted(self._manager.all_steps(), reverse=True)
            failures = {}
            for step in steps:
                try:
                    state = self._read(step, abstract)
                except ConfigError:
                    raise
                except Exception as error:  # whatever a damaged file makes Orbax, TensorStore or JSON raise
                    if getattr(error, "errno", None) in _NOT_DAMAGE:
                        raise
                    failures[step] = reason(error)
                    if self._read_only and not (self._folder / str(step) / "record" / "metadata").exists():
                        break  # replaced by newer ones
                    continue
                self._set_aside(failures)
                return state
            else:
                if not steps:
                    return None
                if not self._read_only:
                    break
        self._report(failures)
        if self._read_only:
            raise TrainingError(f"no state in {self._folder} can be read: {next(iter(failures.values()))}")
        raise TrainingError(
            f"no state in {self._folder} can be read; move the working directory away to start from the beginning"
        )

    def _report(self, failures: dict[int, str]) -> None:
        for step, why in failures.items():
            _log.warning("the state of step %d is damaged (%s)", step, why)

    def _set_aside(self, damaged: dict[int, str]) -> None:
        """Reports damaged states and moves them out of the way, because Orbax saves no step that it already has."""
        self._report(damaged)
        if damaged and not self._read_only:
            self._manager.close()
            for step in damaged:
                os.replace(self._folder / str(step), self._folder / f"damaged-{step}-{time.time_ns()}")
            self._manager = self._open()

    def _read(self, step: int, abstract: TrainState) -> TrainState:
        args = self._ocp.args
        record = self._manager.restore(step, args=args.Composite(record=args.JsonRestore())).record
        if record.keys() != {"sha256", "best"}:  # as the first version wrote it, without a hash of its own
            if record.pop("record_sha256", None) != _digest_of(record):
                raise ValueError("its record is not what was saved")
            self._compare(record["config"], step)

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
            best = {"step": best["step"], "accuracy": float(best["accuracy"])}
            self._best_params = tree("best", abstract.params) if "best" in record["sha256"] else state.params
        self.best, self._meta = best, record.get("meta", self._meta)
        return state

    def _compare(self, saved: dict[str, Any] | None, step: int) -> None:
        """Raises ConfigError if a state was saved under another configuration than this start's."""
        if saved is None or self._config is None:
            return
        there = from_json(json.dumps(saved), f"the state of step {step} in {self._workdir}")
        if names := difference(self._config, there):
            raise ConfigError(
                f"{self._workdir / 'config.json'} is not the configuration that the state of step {step} was trained with; "
                f"these fields differ: {', '.join(names)}. Set them back, or name another --workdir"
            )

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
        config = None if self._config is None else dataclasses.asdict(self._config)
        record: dict[str, Any] = {"sha256": digests, "best": self.best, "config": config, "meta": self._meta}
        record["record_sha256"] = _digest_of(record)
        try:
            self._write_best()
            self._manager.save(step, args=args.Composite(**saved, record=args.JsonSave(record)))
        except Exception as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> TrainingError:
        self._broken = True
        return TrainingError(
            f"saving in {self._workdir} failed ({reason(error, 300)}). The states saved before are as they were; free some "
            "space and give the same command again to go on from the last one"
        )

    def _write_best(self) -> None:
        if self.best is not None and self._written != self.best["step"]:
            save_npz(self._workdir / "best.npz", self._best_params, {**self._meta, **self.best})
            self._written = self.best["step"]

    def export(self, state: TrainState, accuracy: float) -> None:
        """Writes best.npz and final.npz, each with its JSON, where they are missing, damaged or of other weights.

        Raises:
          TrainingError: if a state or a file could not be written.
        """
        self.wait()
        wanted = [("final.npz", state.params, {**self._meta, "step": int(state.step), "accuracy": accuracy})]
        if self.best is not None:
            wanted.append(("best.npz", jax.device_get(self._best_params), {**self._meta, **self.best}))
        try:
            for name, params, meta in wanted:
                if not _holds(self._workdir / name, params, meta):
                    save_npz(self._workdir / name, params, meta)
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
        if self._broken:  # its threads wait for what cannot be saved
            return
        try:
            self._manager.close()
        except Exception as failure:
            if error is None:
                raise self._failed(failure) from failure
