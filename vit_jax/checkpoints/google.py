"""Google's npz files: read in every form they come in, written in the one that was published.

On disk a checkpoint is a zip of arrays with '/'-joined names; unflattened, those names are the parameter tree. Forms
that other versions of the original and of big_vision wrote are brought to the published names on reading (the original's
vit_jax/checkpoint.py; big_vision's models/vit.py).
"""

import contextlib
import dataclasses
import functools
import io
import json
import math
import os
import re
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax.errors import CheckpointError
from vit_jax.files import whole_file

_PREFIXES = ("opt/target/", "params/img/", "params/")
# Today's Linen counts the layers of each kind, the published names count all layers of a block.
_PUBLISHED_NAMES = {"LayerNorm_1": "LayerNorm_2", "MultiHeadDotProductAttention_0": "MultiHeadDotProductAttention_1"}
_PUBLISHED_NAMES |= {"MlpBlock_0": "MlpBlock_3"}
_POSITIONS = "Transformer/posembed_input/pos_embedding"
_GROUP_NORM = re.compile(r"(^|/)gn\w+/(scale|bias)$")
_BFLOAT16 = np.dtype("V2")  # NumPy writes bfloat16 as two bytes without a meaning
# How an npy file begins → the bytes that give its header's length, and NumPy's parser of both.
_NUMPY = {
    b"\x93NUMPY\x01\x00": (2, np.lib.format.read_array_header_1_0),
    b"\x93NUMPY\x02\x00": (4, np.lib.format.read_array_header_2_0),
}
_LONGEST_HEADER = 1024  # bytes; an array of weights needs 118
_TAKEN = ("config", "preprocessor_config", "environment")  # names of JSON files that speak of something else
_CHUNK = 2**20  # bytes read at a time
_READERS = 4  # threads: sums of bytes and copies run beside each other
_LARGEST_RATIO = 16  # of what a file unpacks to over its size; float32 weights stored in the best of ways stay below 3


@dataclasses.dataclass(frozen=True)
class _Member:
    """An array in a file, as its header describes it; nothing of it has been read."""

    info: zipfile.ZipInfo
    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype
    start: int  # of the values, in bytes from the member's beginning


def _header(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> _Member:
    """What a member's header says, once that agrees with the member's size."""
    name = info.filename.removesuffix(".npy")
    try:
        with archive.open(info) as member, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the header is Python to NumPy's parser, which may complain of its spelling
            magic = member.read(8)
            if magic not in _NUMPY:
                raise ValueError("it is no NumPy array")
            digits, parse = _NUMPY[magic]
            length = member.read(digits)
            if (claimed := int.from_bytes(length, "little")) > _LONGEST_HEADER:
                raise ValueError(f"its header claims {claimed} bytes")
            shape, fortran_order, dtype = parse(io.BytesIO(length + member.read(claimed)))
            start = member.tell()
    except Exception as error:  # zip, zlib, NumPy and its header's parser each raise their own
        raise _unreadable(path, name, error) from None
    if dtype.hasobject:
        raise CheckpointError(f"{path}: {name!r} is a pickled object, which is never loaded")
    promised, there = math.prod(shape) * dtype.itemsize, info.file_size - start
    if min(shape, default=0) < 0 or promised != there:
        raise CheckpointError(
            f"{path}: {name!r} cannot be read (shape {list(shape)} of {dtype} takes {promised} bytes, there are {there}); "
            "download the file again"
        )
    return _Member(info, shape, fortran_order, dtype, start)


def _unreadable(path: Path, name: str, error: Exception) -> CheckpointError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return CheckpointError(f"{path}: {name!r} cannot be read ({reason}); download the file again")


def _members(path: Path) -> dict[str, zipfile.ZipInfo]:
    """The arrays of an npz by name, after everything that can be told from the list of its members."""
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder, expected an npz file")
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    size = path.stat().st_size
    if not size:
        raise CheckpointError(f"{path} is empty; download it again")
    with open(path, "rb") as file:  # what the machine refuses is an OSError of its own
        try:
            infos = zipfile.ZipFile(file).infolist()
        except Exception as error:  # a damaged directory makes zipfile raise nearly anything
            raise CheckpointError(f"{path} is no npz, or is cut short ({error}); download it again") from None
    if not infos:
        raise CheckpointError(f"{path} is a zip but no npz of weights: it holds nothing")
    found: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        name = info.filename.removesuffix(".npy")
        if name == info.filename:
            raise CheckpointError(f"{path} is a zip but no npz of weights: it holds {name!r}")
        if not all(re.fullmatch(r"[\w.+-]+", part) and part.strip(".") for part in name.split("/")):
            raise CheckpointError(f"{path} holds {info.filename!r}, which is no name of an array")
        if name in found:
            raise CheckpointError(f"{path} holds {info.filename!r} twice")
        found[name] = info
    # Members that share bytes, or swell: no weights do, and what they would fill is not allocated.
    unpacked = sum(info.file_size for info in infos)
    if sum(info.compress_size for info in infos) > size or unpacked > _LARGEST_RATIO * size:
        raise CheckpointError(f"{path} holds {size} bytes and would unpack to {unpacked}, which no file of weights does")
    return found


def _form(names: Iterable[str]) -> str:
    names = list(names)
    prefix = next((p for p in _PREFIXES if any(name.startswith(p) for name in names)), "")
    if any("/encoderblock/" in name for name in names):
        layout = "scan-stacked"
    elif any("/MlpBlock_0/" in name for name in names):
        layout = "linen"
    else:
        layout = "published"
    return prefix + layout


def form(path: str | os.PathLike) -> str:
    """How a file spells its names: a prefix ("", "opt/target/", "params/", "params/img/") and "published", "linen" or
    "scan-stacked"."""
    return _form(_members(Path(path)))


class _Handles:
    """A `zipfile.ZipFile` for each thread that reads: on Python 3.12 and 3.13, one that threads share gives wrong bytes."""

    def __init__(self, path: Path):
        self._path, self._of_thread, self._closing = path, threading.local(), contextlib.ExitStack()

    def archive(self) -> zipfile.ZipFile:
        """The calling thread's handle."""
        if not hasattr(self._of_thread, "archive"):
            self._of_thread.archive = self._closing.enter_context(zipfile.ZipFile(self._path))
        return self._of_thread.archive

    def __enter__(self) -> "_Handles":
        return self

    def __exit__(self, *_: Any) -> None:
        self._closing.close()


def _values(path: Path, handles: _Handles, member: _Member) -> np.ndarray:
    """A member as a float32 array of finite values. Reads to the member's end, which is where its CRC is checked."""
    name = member.info.filename.removesuffix(".npy")
    if member.dtype != _BFLOAT16 and member.dtype.kind != "f":
        raise CheckpointError(f"{path}: {name!r} has type {member.dtype}, expected floating point numbers")
    # Where it begins at a multiple of 64 bytes, JAX takes an array over on a CPU instead of copying it.
    size = math.prod(member.shape) * member.dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    begin = -raw.ctypes.data % 64
    raw = raw[begin : begin + size]
    try:
        with handles.archive().open(member.info) as file:
            file.read(member.start)
            for at in range(0, size, _CHUNK):
                wanted = min(_CHUNK, size - at)
                part = file.read(wanted)
                if len(part) != wanted:  # NumPy would repeat a single byte over all of the chunk
                    raise ValueError(f"it ends after {at + len(part)} of {size} bytes")
                raw[at : at + wanted] = np.frombuffer(part, np.uint8)
            file.read(1)
    except Exception as error:
        raise _unreadable(path, name, error) from None
    stored = raw.view(ml_dtypes.bfloat16 if member.dtype == _BFLOAT16 else member.dtype)
    with np.errstate(over="ignore"):
        array = stored.astype(np.float32, copy=False).reshape(member.shape, order="F" if member.fortran_order else "C")
    # Least and largest carry a NaN along and make no temporary array as isfinite would.
    if array.size and not np.isfinite([array.min(), array.max()]).all():
        raise CheckpointError(f"{path}: {name!r} holds values that are not finite")
    return array


def _outline(path: Path, handles: _Handles, member: _Member) -> np.ndarray:
    """An array of a member's shape and type without its values, and without memory for them."""
    return np.broadcast_to(np.zeros((), ml_dtypes.bfloat16 if member.dtype == _BFLOAT16 else member.dtype), member.shape)


def _unstacked(name: str, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Blocks stacked by scan, leading axis the layer, as blocks of their own; anything else as it is."""
    if "/encoderblock/" in name and array.ndim:
        for i, layer in enumerate(array):
            yield name.replace("/encoderblock/", f"/encoderblock_{i}/"), layer
    else:
        yield name, array


def _published(name: str) -> str:
    return "/".join(_PUBLISHED_NAMES.get(part, part) for part in name.split("/"))


def _with_class_row(positions: np.ndarray) -> np.ndarray:
    """Positions [1, N, D] of a model with a class token, with the row of that token: zeros where it was folded into `cls`."""
    if positions.ndim != 3 or math.isqrt(max(0, positions.shape[1] - 1)) ** 2 == positions.shape[1] - 1:
        return positions
    return np.concatenate([np.zeros_like(positions[:, :1]), positions], axis=1)


def _read(path: Path, skip: tuple[str, ...], take: Callable[[Path, _Handles, _Member], np.ndarray]) -> dict[str, Any]:
    """The tree of a file under the published names, of what `take` makes of each member; several are taken at a time."""
    members = _members(path)
    spelling = _form(members)
    prefix = next((p for p in _PREFIXES if spelling.startswith(p)), "")
    wanted = {name.removeprefix(prefix): info for name, info in members.items() if name.startswith(prefix)}
    wanted = {name: info for name, info in wanted.items() if name.split("/")[0] not in skip}
    flat: dict[str, np.ndarray] = {}
    with _Handles(path) as handles, ThreadPoolExecutor(_READERS) as pool:
        headers = [_header(path, handles.archive(), info) for info in wanted.values()]
        for short, whole in zip(wanted, pool.map(functools.partial(take, path, handles), headers), strict=True):
            for name, array in _unstacked(short, whole):
                name = name if spelling.endswith("published") else _published(name)
                if _GROUP_NORM.search(name) and array.shape[:-1] == (1, 1, 1):
                    array = array.reshape(-1)
                if name in ("pos_embedding", "Transformer/pos_embedding"):  # big_vision's, now and before 2022
                    name, array = _POSITIONS, _with_class_row(array) if f"{prefix}cls" in members else array
                if name in flat:
                    raise CheckpointError(f"{path}: two arrays stand for {name!r}")
                flat[name] = array
    for name in flat:
        above = name.split("/")[:-1]
        if inside := next((part for i in range(len(above)) if (part := "/".join(above[: i + 1])) in flat), None):
            raise CheckpointError(f"{path}: {inside!r} is an array and has {name!r} below it")
    return unflatten_dict(flat, sep="/")


def read_npz(path: str | os.PathLike, skip: tuple[str, ...] = ()) -> dict[str, Any]:
    """The parameter tree of a file in any known form: nested dicts of float32 NumPy arrays under the published names.

    GroupNorm's leaves come as (C,), bfloat16 as float32, stacked blocks apart; optimizer states are left where they are.
    Modules named in `skip` (such as "head", at the top of the tree) are not read from disk. Pickled members are refused,
    never loaded. Raises CheckpointError with the file and the array it is about.
    """
    return _read(Path(path), skip, _values)


def read_shapes(path: str | os.PathLike, skip: tuple[str, ...] = ()) -> dict[str, Any]:
    """The tree that `read_npz` would give, a jax.ShapeDtypeStruct at every leaf, from the headers alone.

    Types are those on disk. Raises as `read_npz` does for what the headers tell.
    """
    tree = _read(Path(path), skip, _outline)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def save_npz(
    path: str | os.PathLike, params: Mapping[str, Any], meta: Mapping[str, Any] | None = None, dtype: Any = np.float32
) -> None:
    """Writes a parameter tree in the published form, and `meta` as JSON into the file of the same name beside it.

    `dtype` is float32 as published, which the original, timm and `load` read, or bfloat16 for half the size, which `load`
    reads. Each file is put in place whole by a rename: whatever was there before stays until then. ValueError for a name that
    does not end in .npz, CheckpointError for one whose JSON would be another's, such as config.npz; OSError names the file.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"weights are saved in a file whose name ends in .npz, got {path}")
    if path.stem in _TAKEN:
        raise CheckpointError(f"{path} would have its JSON in {path.stem}.json, which is something else; take another name")
    text = None if meta is None else json.dumps(dict(meta), indent=2) + "\n"  # what fails here fails before anything is written
    flat = {}
    for name, leaf in flatten_dict(dict(params), sep="/").items():
        array = np.asarray(leaf).astype(dtype)
        flat[name] = array.reshape(1, 1, 1, -1) if _GROUP_NORM.search(name) else array
    beside, replaces = path.with_suffix(".json"), path.exists()
    with whole_file(path) as file:
        np.savez(file, **flat)  # type: ignore[arg-type]
    if text is not None:
        with whole_file(beside) as file:
            file.write(text.encode())
    elif replaces:
        beside.unlink(missing_ok=True)  # it speaks of the weights that were here before


def read_meta(path: str | os.PathLike) -> dict[str, Any] | None:
    """The JSON beside an npz, or None where there is none: normalisation, image size, class names, task, source."""
    beside = Path(path).with_suffix(".json")
    if not beside.is_file():
        return None
    try:
        found = json.loads(beside.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{beside} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{beside} should hold an object, which describes the weights, holds {str(found)[:40]!r}")
    return found


def check_sums(path: Path) -> None:
    """CheckpointError unless every member of an npz has the checksum it was written with."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # zip and zlib each raise their own
        raise CheckpointError(f"{path} is damaged ({error})") from None
    if damaged:
        raise CheckpointError(f"{path}: {damaged!r} is damaged (its checksum is another)")
