"""The working directory of a run: one process at a time, one configuration, and a record of its environment."""

import contextlib
import dataclasses
import importlib.metadata
import json
import platform
import re
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vit_jax.config import AUTO, Config, difference
from vit_jax.config_files import from_json, to_json
from vit_jax.errors import ConfigError, reason
from vit_jax.files import BEST_WEIGHTS, FINAL_WEIGHTS, locked, remove_scratch, whole_file
from vit_jax.metrics import FILE as METRICS

_CUT_OFF = re.compile(r"\.lock|\..+\.tmp")  # files of a start that was killed at once
_RESOLVED = ("dtype", "attention", "keep_head")  # fields of `model` that a run resolves when it begins


def has_progress(workdir: Path) -> bool:
    """Whether a run in the folder has made a step; before that, another configuration may replace its own."""
    metrics, states = workdir / METRICS, workdir / "checkpoints"
    return (
        (metrics.is_file() and metrics.stat().st_size > 0)
        or (states.is_dir() and any(path.name.isdecimal() for path in states.iterdir()))
        or any((workdir / name).exists() for name in (BEST_WEIGHTS, FINAL_WEIGHTS))
    )


def check_workdir(workdir: Path, config: Config) -> Config:
    """The configuration, with its "auto" fields as the run in the folder has resolved them.

    Raises:
      ConfigError: if the folder holds other files than a run's, or a run of a configuration that differs in other fields
        than those of `run`; the message names them.
    """
    path = workdir / "config.json"
    if path.exists() and has_progress(workdir):
        there = from_json(path.read_text(errors="replace"), str(path))
        if names := difference(config, there):
            raise ConfigError(
                f"{workdir} holds a run of another configuration; these fields differ: {_advice(workdir, config, names)}"
            )
        resolved = {name: getattr(there.model, name) for name in _RESOLVED if getattr(config.model, name) == AUTO}
        return dataclasses.replace(config, model=dataclasses.replace(config.model, **resolved))
    if not path.exists() and workdir.exists() and not _is_unused(workdir):
        raise ConfigError(f"{workdir} is not the folder of a run; name another --workdir")
    return config


def _is_unused(folder: Path) -> bool:
    return folder.is_dir() and all(_CUT_OFF.fullmatch(entry.name) for entry in folder.iterdir())


def _advice(workdir: Path, config: Config, names: list[str]) -> str:
    text = ", ".join(names)
    if names == ["training.steps"] and (workdir / FINAL_WEIGHTS).exists():
        steps = config.training.steps
        command = [
            "python",
            "-m",
            "vit_jax",
            "train",
            "--config",
            str(workdir / "config.json"),
            f"--config.training.steps={steps}",
        ]
        command += [f"--config.model.checkpoint={workdir}"] + (["--config.model.variant="] if config.model.variant else [])
        command += ["--workdir", f"{workdir}-{steps}"]
        return f"{text}. That run is finished; to train longer, start a new run from its weights: {shlex.join(command)}"
    return f"{text}. Name another --workdir, or set the fields back"


class Busy(ConfigError):
    """Another process trains in the folder."""


@contextlib.contextmanager
def lock_workdir(workdir: Path, config: Config) -> Iterator[None]:
    """Creates and locks the folder for the duration of the block, and writes config.json.

    Raises:
      ConfigError: as `check_workdir`, if another process trains in the folder, and if the folder cannot be written.
    """
    check_workdir(workdir, config)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(workdir / ".lock", f"trains in {workdir}", wait=False))
        except BlockingIOError:
            raise Busy(f"another process trains in {workdir}; wait for it or name another --workdir") from None
        except OSError as error:
            raise ConfigError(f"{workdir} cannot be written or locked ({reason(error)}); name another --workdir") from None
        check_workdir(workdir, config)  # again: another process may have trained here since
        remove_scratch(workdir)
        with whole_file(workdir / "config.json") as file:
            file.write(to_json(config).encode())
        yield


def record_environment(workdir: Path, devices: str, warnings: Sequence[str]) -> None:
    """Writes environment.json: versions, devices, command, time and warnings of this start of the run."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "numpy")}
    found: dict[str, Any] = {"python": platform.python_version(), **versions, "devices": devices}
    found |= {"command": " ".join(sys.argv), "started": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    found |= {"warnings": list(warnings)} if warnings else {}
    with whole_file(workdir / "environment.json") as file:
        file.write(json.dumps(found, indent=2).encode() + b"\n")
