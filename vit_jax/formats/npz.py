"""Reads npz files of unknown origin: sizes are checked before memory is allocated, and nothing is unpickled."""

import contextlib
import dataclasses
import io
import math
import os
import threading
import warnings
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from vit_jax.errors import CheckpointError, reason

BFLOAT16 = np.dtype("V2")  # NumPy writes bfloat16 as two bytes without a meaning
# First bytes of an npy file → the number of bytes that give its header's length, and NumPy's parser of the header.
_NUMPY = {
    b"\x93NUMPY\x01\x00": (2, np.lib.format.read_array_header_1_0),
    b"\x93NUMPY\x02\x00": (4, np.lib.format.read_array_header_2_0),
}
_MAX_HEADER = 1024  # bytes; an array of weights needs 118
_MAX_AXES = 32
_MAX_MEMBERS = 10_000  # H/14 with its optimizer's state has fewer than 2,000
_CHUNK = 2**20  # bytes read at a time
_MAX_RATIO = 16  # unpacked bytes over the file's size; float32 weights that are compressed well stay below 3


@dataclasses.dataclass(frozen=True)
class Member:
    """An array in a file as its header describes it. Its values have not been read."""

    info: zipfile.ZipInfo
    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype
    start: int  # of the values, in bytes from the member's beginning

    @property
    def name(self) -> str:
        """The array's name, without ".npy"."""
        return self.info.filename.removesuffix(".npy")


class _Positioned:
    """A file object for one `zipfile.ZipFile`: its own position on a descriptor that several threads share."""

    def __init__(self, descriptor: int):
        self._descriptor, self._at = descriptor, 0

    def read(self, size: int = -1) -> bytes:
        found = os.pread(self._descriptor, self._size() - self._at if size < 0 else size, self._at) if size else b""
        self._at += len(found)
        return found

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size()}[whence]
        if at < 0:
            raise OSError(f"seek to {at}, before the start of the file")
        self._at = at
        return at

    def tell(self) -> int:
        return self._at

    def seekable(self) -> bool:
        return True

    def _size(self) -> int:
        return os.fstat(self._descriptor).st_size


class Npz:
    """An npz file that several threads may read at once; a context manager.

    The file is opened once, so a file that replaces it later is not read. Each thread has its own `zipfile.ZipFile`, because
    a shared one gives wrong bytes on Python 3.12 and 3.13.

    Args:
      path: the file.
      kind: what the arrays are, for messages.
      advice: what to do about a damaged file, for messages.
      largest: bytes that the arrays may take together; default: 16 times the file's size.

    Attributes:
      infos: the array's name → its entry in the zip's directory.

    Raises:
      CheckpointError: if the file is not an npz or its sizes are impossible; every method raises it and names the file and
        the array.
      OSError: if the file cannot be opened.
    """

    def __init__(self, path: Path, kind: str = "weights", advice: str = "download it again", largest: int | None = None):
        self.path, self.infos, self._kind, self._advice, self._largest = path, {}, kind, advice, largest
        self._of_thread, self._closing = threading.local(), contextlib.ExitStack()
        if path.is_dir():
            raise CheckpointError(f"{path} is a folder, expected an npz file")
        if not path.is_file():
            raise CheckpointError(f"there is no file {path}")
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._closing.callback(os.close, self._descriptor)
        try:
            self.infos = self._checked_infos()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Npz":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file and every thread's handle."""
        self._closing.close()

    def _checked_infos(self) -> dict[str, zipfile.ZipInfo]:
        path, size = self.path, os.fstat(self._descriptor).st_size
        if not size:
            raise CheckpointError(f"{path} is empty; {self._advice}")
        try:
            infos = self._archive().infolist()
        except Exception as error:  # zipfile raises many kinds for a damaged directory
            raise CheckpointError(f"{path} is not an npz file or is truncated ({reason(error)}); {self._advice}") from None
        if not infos:
            raise CheckpointError(f"{path} is a zip file but not an npz of {self._kind}: it is empty")
        if len(infos) > _MAX_MEMBERS:
            raise CheckpointError(f"{path} holds {len(infos)} members, an npz of {self._kind} has at most {_MAX_MEMBERS}")
        found: dict[str, zipfile.ZipInfo] = {}
        for info in infos:
            name = info.filename.removesuffix(".npy")
            if name == info.filename:
                raise CheckpointError(f"{path} is a zip file but not an npz of {self._kind}: it holds {name[:100]!r}")
            if name in found:
                raise CheckpointError(f"{path} holds {info.filename[:100]!r} twice")
            found[name] = info
        # A hostile file has members that share bytes or expand enormously: refused before memory is allocated.
        unpacked = sum(info.file_size for info in infos)
        largest = _MAX_RATIO * size if self._largest is None else self._largest
        if sum(info.compress_size for info in infos) > size or unpacked > largest:
            raise CheckpointError(
                f"{path} has {size} bytes and would unpack to {unpacked}, more than an npz of {self._kind} can hold"
            )
        return found

    def _archive(self) -> zipfile.ZipFile:
        """Returns the calling thread's handle."""
        if not hasattr(self._of_thread, "archive"):
            file: Any = _Positioned(self._descriptor)
            self._of_thread.archive = self._closing.enter_context(zipfile.ZipFile(file))
        return self._of_thread.archive

    def _unreadable(self, name: str, error: object) -> CheckpointError:
        why = reason(error) if isinstance(error, BaseException) else error
        return CheckpointError(f"{self.path}: {name!r} cannot be read ({why}); {self._advice}")

    def header(self, name: str) -> Member:
        """Reads an array's header and checks it against the member's size."""
        info = self.infos[name]
        try:
            with self._archive().open(info) as member, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # NumPy parses the header as Python, which may warn of its syntax
                magic = member.read(8)
                if magic not in _NUMPY:
                    raise ValueError("it is not a NumPy array")
                digits, parse = _NUMPY[magic]
                length = member.read(digits)
                if (claimed := int.from_bytes(length, "little")) > _MAX_HEADER:
                    raise ValueError(f"its header claims {claimed} bytes")
                shape, fortran_order, dtype = parse(io.BytesIO(length + member.read(claimed)))
                start = member.tell()
        except Exception as error:  # zip, zlib and NumPy each raise their own
            raise self._unreadable(name, error) from None
        if dtype.hasobject:
            raise CheckpointError(f"{self.path}: {name!r} is a pickled object, which is never loaded")
        if dtype.subdtype:
            raise self._unreadable(name, f"its type {dtype} is an array")
        if len(shape) > _MAX_AXES:
            raise self._unreadable(name, f"it has {len(shape)} axes, at most {_MAX_AXES} are expected")
        if not all(type(side) is int and 0 <= side for side in shape):  # NumPy's parser accepts True as an integer
            raise self._unreadable(name, f"its shape is {str(shape)[:100]}")
        claimed_size, there = math.prod(shape) * dtype.itemsize, info.file_size - start
        # NumPy also computes the product without the zeros.
        if claimed_size != there or math.prod(side for side in shape if side) * dtype.itemsize >= 2**62:
            raise self._unreadable(
                name, f"shape {str(list(shape))[:100]} of {dtype} takes {str(claimed_size)[:30]} bytes, there are {there}"
            )
        return Member(info, shape, fortran_order, dtype, start)

    def values(self, member: Member) -> np.ndarray:
        """Reads an array's values in the stored type, up to the member's end, because its CRC is checked there."""
        # JAX uses an array's memory on a CPU without a copy if it begins at a multiple of 64 bytes.
        size = math.prod(member.shape) * member.dtype.itemsize
        raw = np.empty(size + 64, np.uint8)
        begin = -raw.ctypes.data % 64
        raw = raw[begin : begin + size]
        try:
            with self._archive().open(member.info) as file:
                file.read(member.start)
                for at in range(0, size, _CHUNK):
                    wanted = min(_CHUNK, size - at)
                    part = file.read(wanted)
                    if len(part) != wanted:  # else NumPy would broadcast a single byte over the chunk
                        raise ValueError(f"it ends after {at + len(part)} of {size} bytes")
                    raw[at : at + wanted] = np.frombuffer(part, np.uint8)
                file.read(1)
        except Exception as error:
            raise self._unreadable(member.name, error) from None
        stored = raw.view(ml_dtypes.bfloat16 if member.dtype == BFLOAT16 else member.dtype)
        return stored.reshape(member.shape, order="F" if member.fortran_order else "C")
