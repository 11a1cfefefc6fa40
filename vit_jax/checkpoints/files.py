"""Files and folders that appear whole or not at all: written beside their place, put there by a rename."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


def _about(path: Path, error: OSError) -> OSError:
    """The error with the file that was to be, for nobody knows the one it was to grow in."""
    return OSError(error.errno, error.strerror or str(error), str(path))


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file open for writing that takes `path`'s place when the block ends well; what was there before stays until then."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(scratch, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except OSError as error:
        raise _about(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink()


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """An empty folder to fill that becomes `path` when the block ends well; FileExistsError where something is there."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(17, "it exists already; name another folder or remove it", str(path))
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.mkdir()
        yield scratch
        for file in scratch.rglob("*"):
            if file.is_file():
                with open(file, "rb") as written:
                    os.fsync(written.fileno())
        os.replace(scratch, path)
    except OSError as error:
        raise _about(path, error) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
