"""Atomic files and folders, locks between processes, hashes, and the cache folder."""

import contextlib
import fcntl
import hashlib
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from vit_jax.errors import UserError

_log = logging.getLogger("vit_jax")

# What a run leaves in its folder: the weights of its last step and of its best evaluation.
FINAL_WEIGHTS, BEST_WEIGHTS = "final.npz", "best.npz"
_SCRATCH = re.compile(r"\.(.+)\.\d+(?:-[0-9a-f]{8})?\.tmp")  # ".NAME.PROCESS-RANDOM.tmp"


def _with_name(path: Path, error: OSError) -> OSError:
    """Returns the error with the name of the final file instead of its scratch file."""
    return OSError(error.errno, error.strerror or str(error), str(path))


def _flock(descriptor: int) -> bool:
    """Takes the lock; returns False if another process holds it. True also if the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def remove_scratch(folder: Path, name: str = "") -> None:
    """Removes the scratch files and folders that killed processes left in `folder`; with `name`, only those of that file.

    A running process holds a lock on its scratch file or folder, which is not removed.
    """
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(folder)):
            found = _SCRATCH.fullmatch(entry.name)
            if not found or (name and found[1] != name):
                continue
            with contextlib.suppress(OSError):
                descriptor = os.open(entry.path, os.O_RDONLY | os.O_NOFOLLOW)
                try:
                    if not _flock(descriptor):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        shutil.rmtree(entry.path)
                    else:
                        os.unlink(entry.path)
                finally:
                    os.close(descriptor)


def _make_scratch(path: Path, make: Callable[[Path], int]) -> tuple[Path, int]:
    """Returns a scratch path for `path` and its locked descriptor; `make` creates the file or folder and opens it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_scratch(path.parent, path.name)
    while True:
        scratch = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
        descriptor = make(scratch)
        _flock(descriptor)
        if scratch.exists():  # otherwise another process removed it before it was locked
            return scratch, descriptor
        os.close(descriptor)


def _make_file(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def _make_folder(path: Path) -> int:
    path.mkdir()
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a file for writing that replaces `path` when the block ends without an error.

    Until then the old file stays. Scratch files of killed processes for the same path are removed first.

    Raises:
      OSError: if the file cannot be written; it names `path`.
    """
    scratch = None
    try:
        scratch, descriptor = _make_scratch(path, _make_file)
        with open(scratch, "wb", opener=lambda *_: descriptor) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(scratch, path)
    except OSError as error:
        raise _with_name(path, error) from error
    finally:
        if scratch:
            with contextlib.suppress(OSError):
                scratch.unlink()


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Creates an empty folder that becomes `path` when the block ends without an error.

    Raises:
      FileExistsError: if something other than an empty folder is at `path`.
      OSError: if the folder cannot be written; it names `path`.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(17, "it exists already; give another folder or remove it", str(path))
    scratch = descriptor = None
    try:
        scratch, descriptor = _make_scratch(path, _make_folder)
        yield scratch
        for file in scratch.rglob("*"):
            if file.is_file():
                with open(file, "rb") as written:
                    os.fsync(written.fileno())
        os.replace(scratch, path)
    except OSError as error:
        raise _with_name(path, error) from error
    finally:
        if scratch and descriptor is not None:
            os.close(descriptor)
            shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def locked(path: Path, purpose: str, wait: bool = True) -> Iterator[None]:
    """Holds a lock between processes on the file `path`; the system releases it when the process ends, also by a kill.

    If another process holds the lock, this is logged with `purpose`, such as "downloads ViT-B_16.npz", and the block starts
    when that process releases it. The file is not removed: a process that waits for the removed file and a later process
    would lock two different files.

    Raises:
      BlockingIOError: without `wait`, if another process holds the lock.
      OSError: if the file cannot be opened; without `wait`, also if the file system has no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        if not wait:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        elif not _flock(file.fileno()):
            _log.warning("waiting for another process that %s (it holds %s)", purpose, path)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def sha256(path: str | os.PathLike) -> str:
    """Returns the SHA-256 of a file's bytes as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def expand_user(path: str | os.PathLike, name: str) -> Path:
    """Returns the path with `~` or `~user` replaced by the home directory.

    Raises:
      UserError: if the user does not exist; the message begins with `name`, the field or variable with the path.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        user = os.fspath(path).split("/")[0]
        raise UserError(f"{name}={os.fspath(path)!r}: the user {user!r} does not exist; give an absolute path") from None


def cache_root() -> Path:
    """Returns the cache folder: $VIT_JAX_CACHE, else `vit_jax` in $XDG_CACHE_HOME, else `~/.cache/vit_jax`.

    Raises:
      UserError: if the variable names the home of a user who does not exist.
      OSError: if there is neither a variable nor a home directory.
    """
    if root := os.environ.get("VIT_JAX_CACHE"):
        return expand_user(root, "VIT_JAX_CACHE")
    if root := os.environ.get("XDG_CACHE_HOME"):
        return expand_user(root, "XDG_CACHE_HOME") / "vit_jax"
    try:
        return Path.home() / ".cache" / "vit_jax"
    except RuntimeError:
        raise OSError("the home directory is not known: set HOME or VIT_JAX_CACHE") from None
