"""Google's npz files: read in every form they come in, written in the one that was published.

On disk a checkpoint is a zip of arrays with '/'-joined names; unflattened, those names are the parameter tree. Forms
that other versions of the original and of big_vision wrote are brought to the published names on reading (the original's
vit_jax/checkpoint.py; big_vision's models/vit.py).
"""

import json
import math
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

_PREFIXES = ("opt/target/", "params/img/", "params/")
# Today's Linen counts the layers of each kind, the published names count all layers of a block.
_PUBLISHED_NAMES = {"LayerNorm_1": "LayerNorm_2", "MultiHeadDotProductAttention_0": "MultiHeadDotProductAttention_1"}
_PUBLISHED_NAMES |= {"MlpBlock_0": "MlpBlock_3"}
_POSITIONS = "Transformer/posembed_input/pos_embedding"


class CheckpointError(ValueError):
    """A file that holds no usable weights; the message names the file, what was expected, what was found."""


def _members(path: Path) -> list[str]:
    """The names of the arrays of an npz, after everything that can be told without reading one."""
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder, expected an npz file")
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    if not path.stat().st_size:
        raise CheckpointError(f"{path} is empty; download it again")
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is no npz, or is cut short ({error}); download it again") from None
    odd = [name for name in names if not name.endswith(".npy")]
    if odd or not names:
        raise CheckpointError(f"{path} is a zip but no npz of weights: it holds {repr(odd[0]) if odd else 'nothing'}")
    if len(set(names)) != len(names):
        raise CheckpointError(f"{path} holds {next(n for n in names if names.count(n) > 1)!r} twice")
    return [name.removesuffix(".npy") for name in names]


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


def _array(archive: zipfile.ZipFile, name: str, path: Path) -> np.ndarray:
    """One member as a float32 array of finite values. Reads to the member's end, which is where its CRC is checked."""
    try:
        with archive.open(f"{name}.npy") as member:
            array = np.lib.format.read_array(member, allow_pickle=False)
            if member.read(1):
                raise ValueError("there is more in it than an array")
    except Exception as error:  # zip, zlib, NumPy and its header's parser each raise their own
        if "allow_pickle" in str(error):
            raise CheckpointError(f"{path}: {name!r} is a pickled object, which is never loaded") from None
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(f"{path}: {name!r} cannot be read ({reason}); download the file again") from None
    if array.dtype == np.dtype("V2"):  # NumPy writes bfloat16 as two bytes without a meaning
        array = array.view(ml_dtypes.bfloat16)
    elif array.dtype.kind != "f":
        raise CheckpointError(f"{path}: {name!r} has type {array.dtype}, expected floating point numbers")
    with np.errstate(over="ignore"):
        array = np.asarray(array, np.float32)
    # Least and largest carry a NaN along and make no temporary array as isfinite would.
    if array.size and not np.isfinite([array.min(), array.max()]).all():
        raise CheckpointError(f"{path}: {name!r} holds values that are not finite")
    return array


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


def read_npz(path: str | os.PathLike, skip: tuple[str, ...] = ()) -> dict[str, Any]:
    """The parameter tree of a file in any known form: nested dicts of float32 NumPy arrays under the published names.

    GroupNorm's leaves come as (C,), bfloat16 as float32, stacked blocks apart; optimizer states are left where they are.
    Modules named in `skip` (such as "head", at the top of the tree) are not read from disk. Pickled members are refused,
    never loaded. Raises CheckpointError with the file and the array it is about.
    """
    path = Path(path)
    members = _members(path)
    spelling = _form(members)
    prefix = next((p for p in _PREFIXES if spelling.startswith(p)), "")
    flat: dict[str, np.ndarray] = {}
    with zipfile.ZipFile(path) as archive:
        for member in members:
            short = member.removeprefix(prefix)
            if not member.startswith(prefix) or short.split("/")[0] in skip:
                continue
            for name, array in _unstacked(short, _array(archive, member, path)):
                name = name if spelling.endswith("published") else _published(name)
                if re.search(r"(^|/)gn\w+/(scale|bias)$", name) and array.shape[:-1] == (1, 1, 1):
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


def save_npz(
    path: str | os.PathLike, params: Mapping[str, Any], meta: Mapping[str, Any] | None = None, dtype: Any = np.float32
) -> None:
    """Writes a parameter tree in the published form, and `meta` as JSON into the file of the same name beside it.

    `dtype` is float32 as published, which the original, timm and `load` read, or bfloat16 for half the size, which `load`
    reads. Each file is put in place whole by a rename: whatever was there before stays until then.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"weights are saved in a file whose name ends in .npz, got {path}")
    text = None if meta is None else json.dumps(dict(meta), indent=2) + "\n"  # what fails here fails before anything is written
    flat = {}
    for name, leaf in flatten_dict(dict(params), sep="/").items():
        array = np.asarray(leaf).astype(dtype)
        flat[name] = array.reshape(1, 1, 1, -1) if re.search(r"(^|/)gn\w+/(scale|bias)$", name) else array
    path.parent.mkdir(parents=True, exist_ok=True)

    def place(target: Path, write: Callable[[Any], Any]) -> None:
        scratch = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            with open(scratch, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(scratch, target)
        finally:
            scratch.unlink(missing_ok=True)

    beside, replaces = path.with_suffix(".json"), path.exists()
    place(path, lambda file: np.savez(file, **flat))  # type: ignore[arg-type]
    if text is not None:
        place(beside, lambda file: file.write(text.encode()))
    elif replaces:
        beside.unlink(missing_ok=True)  # it speaks of the weights that were here before


def read_meta(path: str | os.PathLike) -> dict[str, Any] | None:
    """The JSON beside an npz, or None where there is none: normalisation, image size, class names, task, source."""
    beside = Path(path).with_suffix(".json")
    if not beside.is_file():
        return None
    try:
        return json.loads(beside.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{beside} is not JSON: {error}") from None
