"""Reads the states that a run has saved: every byte is checked, and a damaged state is replaced by the one before it.

A state is a folder `checkpoints/<step>` that Orbax wrote: the item `state`, the item `best` (the best parameters, which are
the model's, if the state's are others), and `record`, one JSON object with the SHA-256 of every array and of itself.
"""

import dataclasses
import errno
import functools
import hashlib
import json
import logging
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax.config import Config, difference
from vit_jax.config_files import from_json
from vit_jax.errors import ConfigError, TrainingError, reason
from vit_jax.training.state import TrainState
from vit_jax.training.tuning import model_tree

_log = logging.getLogger("vit_jax")
_ATTEMPTS = 20  # to read a state while a training process replaces states
# Errors of the machine, which say nothing about a file.
_OF_THE_MACHINE = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM)


@dataclasses.dataclass(frozen=True)
class Saved:
    """A saved state with everything that was saved next to it, on the host."""

    state: TrainState
    record: dict[str, Any]
    best_params: Any  # None before the first evaluation
    newer: list[int]  # steps of newer states, which are damaged


def steps(folder: Path) -> list[int]:
    """The steps of the states in a run's folder `checkpoints`, the newest first. Orbax renames a state when it is whole."""
    try:
        return sorted((int(entry.name) for entry in os.scandir(folder) if re.fullmatch(r"\d{1,18}", entry.name)), reverse=True)
    except (FileNotFoundError, NotADirectoryError):
        return []


def flat(tree: Any) -> dict[str, np.ndarray]:
    """The leaves of a tree under the names by which states store them."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def digest(leaf: np.ndarray) -> str:
    """The SHA-256 of an array's values, type and shape."""
    found = hashlib.sha256(str((leaf.dtype, leaf.shape)).encode())
    found.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)  # a copy would stop the other threads meanwhile
    return found.hexdigest()


def make_record(
    items: Mapping[str, Mapping[str, np.ndarray]],
    best: Mapping[str, Any] | None,
    config: Config,
    meta: Any,
    params: Any,
    skipped: list[int],
    unfinished: Mapping[str, float] | None,
) -> dict[str, Any]:
    """What is saved next to the arrays of a state, with its own SHA-256.

    Args:
      items: the arrays of each item, by name.
      best: the step and the accuracy of the best evaluation.
      config: the run's configuration.
      meta: the description of the run's weights.
      params: the model's; the record holds their shapes, from which the model is known.
      skipped: of guard.Guard.
      unfinished: of saving.Saver.
    """
    found = {
        "sha256": {item: {name: digest(leaf) for name, leaf in leaves.items()} for item, leaves in items.items()},
        "best": best,
        "config": dataclasses.asdict(config),
        "meta": meta,
        "shapes": {name: list(leaf.shape) for name, leaf in flatten_dict(params, sep="/").items()},
        "skipped": list(skipped),
        "unfinished": unfinished,
    }
    return {**found, "record_sha256": _digest_of_json(found)}


def _digest_of_json(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@functools.cache
def ignore_late_callbacks() -> None:
    """Hides what TensorStore reports to an event loop of Orbax that is closed because an operation failed.

    Each of its remaining operations would print a traceback of this error, which tells nothing new.
    """
    report = sys.unraisablehook

    def filtered(unraisable: Any) -> None:
        if not (isinstance(unraisable.exc_value, RuntimeError) and str(unraisable.exc_value) == "Event loop is closed"):
            report(unraisable)

    sys.unraisablehook = filtered


def _read_record(folder: Path, step: int) -> dict[str, Any]:
    """The record of a state; ValueError if it does not have its own SHA-256."""
    record = json.loads((folder / str(step) / "record" / "metadata").read_text(errors="replace"))
    if isinstance(record, dict) and record.keys() == {"sha256", "best"}:  # of a version that stored no more
        return record
    if not isinstance(record, dict) or record.pop("record_sha256", None) != _digest_of_json(record):
        raise ValueError("its record does not have its own SHA-256")
    return record


def newest_record(folder: Path) -> dict[str, Any] | None:
    """The newest record in a run's folder `checkpoints` that can be read; None if there is none."""
    for step in steps(folder):
        try:
            record = _read_record(folder, step)
            return record if "shapes" in record else None
        except (OSError, ValueError, RecursionError):
            continue  # `read_newest` reports it
    return None


def shapes_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of the shapes of a record's parameters, all float32."""
    leaves = {name: jax.ShapeDtypeStruct(tuple(shape), np.float32) for name, shape in record["shapes"].items()}
    return unflatten_dict(leaves, sep="/")


def orbax_processes() -> Any:
    """Orbax's options for which processes use it: on several hosts, only host 0.

    It reads and writes whole arrays, because their SHA-256 is of the whole. So a state does not depend on the hosts either.
    """
    import orbax.checkpoint as ocp

    return ocp.options.MultiprocessingOptions(active_processes={0} if jax.process_count() > 1 else None)


def _read(folder: Path, step: int, abstract: TrainState) -> Saved:
    """Reads one state; raises an error of any kind if it is damaged."""
    import orbax.checkpoint as ocp

    record = _read_record(folder, step)

    def tree(item: str, like: Any) -> Any:
        wanted = flat(like)
        as_numpy = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in wanted}
        arguments = ocp.args.PyTreeRestore(dict.fromkeys(wanted, 0), restore_args=as_numpy)
        options = orbax_processes()
        handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=options)
        with ocp.Checkpointer(handler, multiprocessing_options=options) as checkpointer:
            found = checkpointer.restore(folder.absolute() / str(step) / item, args=arguments)
        for name, leaf in wanted.items():
            if (found[name].dtype, found[name].shape) != (leaf.dtype, leaf.shape):
                raise ValueError(f"{name} is {found[name].dtype} {found[name].shape}, not {leaf.dtype} {leaf.shape}")
            if digest(found[name]) != record["sha256"][item][name]:
                raise ValueError(f"{name} does not have the SHA-256 of its record")
        return jax.tree.unflatten(jax.tree.structure(like), [found[name] for name in wanted])

    state, best = tree("state", abstract), None
    if record["best"] is not None:
        best = tree("best", model_tree(abstract.params)) if "best" in record["sha256"] else state.params
    return Saved(state, record, best, [])


def _refusal(error: Exception) -> OSError | None:
    """The error of the machine that caused an error, such as too many open files, which is no damage to any file."""
    cause: BaseException | None = error
    for _ in range(10):
        if isinstance(cause, OSError) and cause.errno in _OF_THE_MACHINE:
            return cause
        cause = cause and (cause.__cause__ or cause.__context__)
    found = re.search(r"\[OS error (\d+)", str(error))  # TensorStore's
    number = int(found[1]) if found else 0
    return OSError(number, os.strerror(number)) if number in _OF_THE_MACHINE else None


def read_newest(folder: Path, abstract: TrainState, config: Config) -> Saved | None:
    """The newest state that is whole, with the structure, shapes and types of `abstract`; None if no state is there.

    A damaged state is reported, and the one before it is read. A running training may replace states meanwhile: the
    newest one is then read instead.

    Raises:
      ConfigError: if the state belongs to another configuration.
      TrainingError: if no state can be read.
      OSError: if the machine refuses to read (permission, too many open files).
    """
    ignore_late_callbacks()
    for _ in range(_ATTEMPTS):
        listed, why = steps(folder), ""
        for number, step in enumerate(listed):
            try:
                saved = _read(folder, step, abstract)
            except Exception as error:  # Orbax, TensorStore and JSON raise many kinds of errors for damaged files
                if refusal := _refusal(error):
                    raise OSError(refusal.errno, refusal.strerror, str(folder / str(step))) from error
                if steps(folder) != listed:
                    break
                why = why or reason(error)
                _log.warning("the state of step %d is damaged (%s)", step, reason(error))
                continue
            _check_config(folder, saved.record, config)
            return dataclasses.replace(saved, newer=listed[:number])
        else:
            if not listed:
                return None
            raise TrainingError(
                f"no state in {folder} can be read (the newest: {why}); "
                "move the working directory away to start from the beginning"
            )
    raise TrainingError(f"the states in {folder} are replaced faster than they can be read; try again")


def _check_config(folder: Path, record: Mapping[str, Any], config: Config) -> None:
    """ConfigError if a state was saved under another configuration, as after config.json was edited."""
    if "config" not in record:
        return
    there = from_json(json.dumps(record["config"]), f"the configuration saved in {folder}")
    # Both know their steps: with training.epochs these follow from the images, of which there may be more or fewer now.
    longer = config.training.steps != there.training.steps
    if names := difference(config, there) or ["training.steps"] * longer:
        values = [f"{name} = {_value(there, name)!r} when it was saved, {_value(config, name)!r} now" for name in names]
        raise ConfigError(
            f"{folder.parent / 'config.json'} is not the configuration of the saved state: {', '.join(values)}; "
            "set the fields back, or name another --workdir"
        )


def _value(config: Config, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config


def check_data(saved: Mapping[str, Any] | None, meta: dict[str, Any]) -> dict[str, Any]:
    """Returns `meta`, the description of a run's weights, if its data are those that the record of a saved state describes.

    Raises:
      ConfigError: if the classes or the user's own images are others than when the run began.
    """
    before = (saved or {}).get("meta", {})
    for name, what in (("class_names", "classes"), ("images_sha256", "images")):
        if before.get(name, meta[name]) != meta[name]:
            raise ConfigError(
                f"the {what} of {meta['task']} have changed since this run began, so it would not be the same: restore them, "
                "or start a new run with another --workdir"
            )
    return meta
