"""Google's npz files: read in every form they come in, written in the one that was published.

On disk a checkpoint is a zip of arrays with '/'-joined names; unflattened, those names are the parameter tree. Forms
that other versions of the original and of big_vision wrote are brought to the published names on reading (the original's
vit_jax/checkpoint.py; big_vision's models/vit.py).
"""

import functools
import json
import math
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax.errors import CheckpointError, reason
from vit_jax.files import whole_file
from vit_jax.formats.meta import describes_weights, parse
from vit_jax.formats.npz import BFLOAT16, Member, Npz

_PREFIXES = ("opt/target/", "params/img/", "params/")
# Today's Linen counts the layers of each kind, the published names count all layers of a block.
_PUBLISHED_NAMES = {"LayerNorm_1": "LayerNorm_2", "MultiHeadDotProductAttention_0": "MultiHeadDotProductAttention_1"}
_PUBLISHED_NAMES |= {"MlpBlock_0": "MlpBlock_3"}
_POSITIONS = "Transformer/posembed_input/pos_embedding"
_GROUP_NORM = re.compile(r"(^|/)gn\w+/(scale|bias)$")
_TAKEN = ("config", "preprocessor_config", "environment")  # names of JSON files that speak of something else
_LARGEST_JSON = 2**24  # bytes; 21,843 class names take 2**20
_READERS = 4  # threads: checksums and copies run at the same time


def _open(path: Path) -> Npz:
    """An npz of weights, whose arrays have names that can be paths in a tree."""
    file = Npz(path)
    for name in file.infos:
        if not all(re.fullmatch(r"[\w.+-]+", part) and part.strip(".") for part in name.split("/")):
            file.close()
            raise CheckpointError(f"{path} holds {name[:100] + '.npy'!r}, which is no name of an array")
    return file


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
    with _open(Path(path)) as file:
        return _form(file.infos)


def _values(file: Npz, member: Member) -> np.ndarray:
    """A member as a float32 array of finite values."""
    if member.dtype != BFLOAT16 and member.dtype.kind != "f":
        raise CheckpointError(f"{file.path}: {member.name!r} has type {member.dtype}, expected floating point numbers")
    with np.errstate(over="ignore"):
        array = file.values(member).astype(np.float32, copy=False)
    # Least and largest carry a NaN along and make no temporary array as isfinite would.
    if array.size and not np.isfinite([array.min(), array.max()]).all():
        raise CheckpointError(f"{file.path}: {member.name!r} holds values that are not finite")
    return array


def _outline(file: Npz, member: Member) -> np.ndarray:
    """An array of a member's shape and type without its values, and without memory for them."""
    return np.broadcast_to(np.zeros((), ml_dtypes.bfloat16 if member.dtype == BFLOAT16 else member.dtype), member.shape)


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


def _read(path: Path, skip: tuple[str, ...], take: Callable[[Npz, Member], np.ndarray]) -> dict[str, Any]:
    """The tree of a file under the published names, of what `take` makes of each member; several are taken at a time."""
    flat: dict[str, np.ndarray] = {}
    with _open(path) as file, ThreadPoolExecutor(_READERS) as pool:
        spelling = _form(file.infos)
        prefix = next((p for p in _PREFIXES if spelling.startswith(p)), "")
        wanted = [name for name in file.infos if name.startswith(prefix)]
        wanted = [name for name in wanted if name.removeprefix(prefix).split("/")[0] not in skip]
        headers = [file.header(name) for name in wanted]
        for stored, whole in zip(wanted, pool.map(functools.partial(take, file), headers), strict=True):
            short = stored.removeprefix(prefix)
            for name, array in _unstacked(short, whole):
                name = name if spelling.endswith("published") else _published(name)
                if _GROUP_NORM.search(name) and array.shape[:-1] == (1, 1, 1):
                    array = array.reshape(-1)
                if name in ("pos_embedding", "Transformer/pos_embedding"):  # big_vision's, now and before 2022
                    name, array = _POSITIONS, _with_class_row(array) if f"{prefix}cls" in file.infos else array
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
    does not end in .npz, CheckpointError if a JSON that describes no weights would be replaced; OSError names the file.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"weights are saved in a file whose name ends in .npz, got {path}")
    if path.stem in _TAKEN:
        raise CheckpointError(f"{path} would have its JSON in {path.stem}.json, which is something else; take another name")
    text = None if meta is None else json.dumps(dict(meta), indent=2) + "\n"  # what fails here fails before anything is written
    beside, replaces = path.with_suffix(".json"), path.exists()
    if text is not None or replaces:
        _check_replaceable(path, beside, meta or {})
    flat = {}
    for name, leaf in flatten_dict(dict(params), sep="/").items():
        array = np.asarray(leaf).astype(dtype)
        flat[name] = array.reshape(1, 1, 1, -1) if _GROUP_NORM.search(name) else array
    with whole_file(path) as file:
        np.savez(file, **flat)  # type: ignore[arg-type]
        if text is not None:  # first: a process that is killed here leaves no weights without their description
            with whole_file(beside) as description:
                description.write(text.encode())
    if text is None and replaces:
        beside.unlink(missing_ok=True)  # it speaks of the weights that were here before


def _check_replaceable(path: Path, beside: Path, meta: Mapping[str, Any]) -> None:
    """CheckpointError if a file is at `beside` that does not describe weights."""
    if not beside.is_file():
        return
    with open(beside, "rb") as file:
        text = file.read(_LARGEST_JSON).decode(errors="replace")
    if not describes_weights(text, meta):
        raise CheckpointError(
            f"{path} would have its JSON in {beside.name}, which is there already and describes no weights; take another name"
        )


def read_meta(path: str | os.PathLike) -> dict[str, Any] | None:
    """The JSON next to an npz, or None if there is none: normalisation, image size, class names, task, source.

    Raises:
      CheckpointError: if it holds anything else than such an object.
    """
    beside = Path(path).with_suffix(".json")
    if not beside.is_file():
        return None
    with open(beside, "rb") as file:
        content = file.read(_LARGEST_JSON + 1)
    if len(content) > _LARGEST_JSON:
        raise CheckpointError(f"{beside} has more than {_LARGEST_JSON} bytes, which no description of weights has")
    return parse(content, beside)


def check_sums(path: Path) -> None:
    """CheckpointError unless every member of an npz has the checksum it was written with."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # zip and zlib each raise their own
        raise CheckpointError(f"{path} is damaged ({reason(error)})") from None
    if damaged:
        raise CheckpointError(f"{path}: {damaged!r} is damaged (its checksum is another)")
