"""Where TFDS keeps the prepared data of a task. Standard library only."""

import os
import re
import shlex
from pathlib import Path

from vit_jax.data.tasks import Task
from vit_jax.errors import DataError, UserError
from vit_jax.files import expand_user


class NotPrepared(DataError):
    """There is no TFDS data of a task in the directory; the message names the command that prepares it."""


def data_root(task: Task, data_dir: str | os.PathLike = "") -> Path:
    """Returns the directory in which TFDS keeps the task's data set.

    The first of: `data_dir`, the task's own directory, the environment variable TFDS_DATA_DIR, ~/tensorflow_datasets.

    Raises:
      DataError: if that is the home of a user who does not exist.
    """
    if chosen := os.fspath(data_dir) or task.data_dir:
        name = "data_dir"
    elif chosen := os.environ.get("TFDS_DATA_DIR", ""):
        name = "TFDS_DATA_DIR"
    else:
        chosen, name = "~/tensorflow_datasets", "HOME"
    try:
        return expand_user(chosen, name)
    except UserError as error:
        raise DataError(str(error)) from None


def find_prepared(task: Task, data_dir: str | os.PathLike = "") -> Path | None:
    """Returns the folder of the task's prepared data, or None if they are not prepared.

    The folder is `<data_root>/<builder>/<newest version>`. Data that come with the package are found with any `data_dir`; a
    version in `data_dir` comes first.
    """
    return find_version(task, data_root(task, data_dir)) or (find_version(task, data_root(task)) if task.data_dir else None)


def find_version(task: Task, root: Path) -> Path | None:
    """Returns the folder of the newest version of the task's data set in one directory; None if there is none."""
    found = {}
    for info in (root / task.builder).glob("*/dataset_info.json"):
        # A folder with another name than a version is TFDS's unfinished work ("incomplete.XXXXXX_3.0.2").
        if re.fullmatch(r"\d+\.\d+\.\d+", info.parent.name):
            found[tuple(int(part) for part in info.parent.name.split("."))] = info.parent
    return found[max(found)] if found else None


def prepare_command(task: Task, data_dir: str | os.PathLike = "", archive: str = "") -> str:
    """Returns the command line that prepares the task, with the given options."""
    options = [("--archive", archive), ("--data_dir", os.fspath(data_dir))]
    given = [f"{option} {shlex.quote(value)}" for option, value in options if value]
    return " ".join([f"python -m vit_jax.data prepare {task.name}", *given])
