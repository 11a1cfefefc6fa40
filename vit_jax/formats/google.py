"""Google's npz files: reads all published forms, writes the original one.

On disk a checkpoint is a zip of arrays whose names are joined by "/"; unflattened, the names are the parameter tree. Later
versions of the original and of big_vision wrote other forms. Reading renames them to the published names (sources: the
original's vit_jax/checkpoint.py, big_vision's models/vit.py).
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
POSITIONS = "Transformer/posembed_input/pos_embedding"  # the path of the position embeddings in a flat tree
_GROUP_NORM = re.compile(r"(^|/)gn\w+/(scale|bias)$")
_RESERVED = ("config", "preprocessor_config", "environment")  # their JSON files have another meaning
_MAX_JSON = 2**24  # bytes; 21,843 class names take 2**20
_READERS = 4  # threads: checksums and copies run at the same time


def _open(path: Path) -> Npz:
    """Opens an npz of weights and checks that every array's name can be a path in a tree."""
    file = Npz(path)
    for name in file.infos:
        if not all(re.fullmatch(r"[\w.+-]+", part) and part.strip(".") for part in name.split("/")):
            file.close()
            raise CheckpointError(f"{path}: {name[:100] + '.npy'!r} is not a valid name of an array")
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
    """Returns the form of a file's names.

    Returns:
      A prefix ("", "opt/target/", "params/" or "params/img/") and "published", "linen" or "scan-stacked".

    Raises:
      CheckpointError: if the file is not an npz of weights.
    """
    with _open(Path(path)) as file:
        return _form(file.infos)


def _values(file: Npz, member: Member) -> np.ndarray:
    """Reads a member as a float32 array of finite values."""
    if member.dtype != BFLOAT16 and member.dtype.kind != "f":
        raise CheckpointError(f"{file.path}: {member.name!r} has type {member.dtype}, expected floating point numbers")
    with np.errstate(over="ignore"):
        array = file.values(member).astype(np.float32, copy=False)
    # min and max propagate NaN, and make no temporary array as isfinite would.
    if array.size and not np.isfinite([array.min(), array.max()]).all():
        raise CheckpointError(f"{file.path}: {member.name!r} holds values that are not finite")
    return array


def _shape_only(file: Npz, member: Member) -> np.ndarray:
    """Returns an array of a member's shape and type without reading values or allocating memory for them."""
    return np.broadcast_to(np.zeros((), ml_dtypes.bfloat16 if member.dtype == BFLOAT16 else member.dtype), member.shape)


def _unstack(name: str, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Splits blocks that scan stacked along the first axis into one array a block; yields any other array unchanged."""
    if "/encoderblock/" in name and array.ndim:
        for i, layer in enumerate(array):
            yield name.replace("/encoderblock/", f"/encoderblock_{i}/"), layer
    else:
        yield name, array


def _published_name(name: str) -> str:
    return "/".join(_PUBLISHED_NAMES.get(part, part) for part in name.split("/"))


def _with_class_row(positions: np.ndarray) -> np.ndarray:
    """Adds the class token's row to positions [1, N, D] if they have none: zeros, because `cls` already contains the row."""
    if positions.ndim != 3 or math.isqrt(max(0, positions.shape[1] - 1)) ** 2 == positions.shape[1] - 1:
        return positions
    return np.concatenate([np.zeros_like(positions[:, :1]), positions], axis=1)


def _read_tree(path: Path, skip: tuple[str, ...], read_member: Callable[[Npz, Member], np.ndarray]) -> dict[str, Any]:
    """Reads a file's tree under the published names; `read_member` makes each leaf, several at the same time."""
    flat: dict[str, np.ndarray] = {}
    with _open(path) as file, ThreadPoolExecutor(_READERS) as pool:
        spelling = _form(file.infos)
        prefix = next((p for p in _PREFIXES if spelling.startswith(p)), "")
        wanted = [name for name in file.infos if name.startswith(prefix)]
        wanted = [name for name in wanted if name.removeprefix(prefix).split("/")[0] not in skip]
        headers = [file.header(name) for name in wanted]
        for stored, whole in zip(wanted, pool.map(functools.partial(read_member, file), headers), strict=True):
            short = stored.removeprefix(prefix)
            for name, array in _unstack(short, whole):
                name = name if spelling.endswith("published") else _published_name(name)
                if _GROUP_NORM.search(name) and array.shape[:-1] == (1, 1, 1):
                    array = array.reshape(-1)
                if name in ("pos_embedding", "Transformer/pos_embedding"):  # big_vision's, now and before 2022
                    name, array = POSITIONS, _with_class_row(array) if f"{prefix}cls" in file.infos else array
                if name in flat:
                    raise CheckpointError(f"{path}: two arrays have the name {name!r}")
                flat[name] = array
    for name in flat:
        above = name.split("/")[:-1]
        if inside := next((part for i in range(len(above)) if (part := "/".join(above[: i + 1])) in flat), None):
            raise CheckpointError(f"{path}: {inside!r} is an array and has {name!r} below it")
    return unflatten_dict(flat, sep="/")


def read_npz(path: str | os.PathLike, skip: tuple[str, ...] = ()) -> dict[str, Any]:
    """Reads the parameter tree of a file in any known form. Pickled members are refused, never loaded.

    Args:
      path: the npz file.
      skip: names of top-level modules, such as "head", that are not read from disk.

    Returns:
      Nested dicts of float32 NumPy arrays under the published names. GroupNorm's leaves are (C,), bfloat16 becomes float32,
      and stacked blocks are split. Optimizer states are not read.

    Raises:
      CheckpointError: if the file is not such an npz, is damaged, or holds values that are not finite; the message names the
        file and the array.
    """
    return _read_tree(Path(path), skip, _values)


def read_shapes(path: str | os.PathLike, skip: tuple[str, ...] = ()) -> dict[str, Any]:
    """Reads the tree of `read_npz` from the headers only.

    Args:
      path, skip: as for `read_npz`.

    Returns:
      Nested dicts of jax.ShapeDtypeStruct; the dtypes are those on disk.

    Raises:
      CheckpointError: as `read_npz`, for what the headers show.
    """
    tree = _read_tree(Path(path), skip, _shape_only)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def save_npz(
    path: str | os.PathLike, params: Mapping[str, Any], meta: Mapping[str, Any] | None = None, dtype: Any = np.float32
) -> None:
    """Writes a parameter tree in the published form, and `meta` as a JSON file of the same name next to it.

    Each file is written whole and then renamed, so an earlier file stays until the new one is complete.

    Args:
      path: the file; its name ends in .npz.
      params: nested dicts of arrays.
      meta: normalisation, image size, class names, task, source. None: no JSON; an earlier one is removed.
      dtype: float32 as published, which the original, timm and `load` read, or bfloat16 (half the size, `load` reads it).

    Raises:
      ValueError: if the name does not end in .npz.
      CheckpointError: if the JSON would replace a file that does not describe weights.
      OSError: if a file cannot be written; it names the file.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"{path}: the file name must end in .npz")
    json_path = path.with_suffix(".json")
    if path.stem in _RESERVED:
        raise CheckpointError(f"{path}: its description would be {json_path.name}, a reserved name; take another name")
    text = None if meta is None else json.dumps(dict(meta), indent=2) + "\n"  # first: an error here must leave no file behind
    replaces = path.exists()
    if text is not None or replaces:
        _check_replaceable(path, json_path, meta or {})
    flat = {}
    for name, leaf in flatten_dict(dict(params), sep="/").items():
        array = np.asarray(leaf).astype(dtype)
        flat[name] = array.reshape(1, 1, 1, -1) if _GROUP_NORM.search(name) else array
    with whole_file(path) as file:
        np.savez(file, **flat)  # type: ignore[arg-type]
        if text is not None:  # before the weights appear, so that a killed process leaves no weights without a description
            with whole_file(json_path) as description:
                description.write(text.encode())
    if text is None and replaces:
        json_path.unlink(missing_ok=True)  # it describes the weights that were replaced


def _check_replaceable(path: Path, json_path: Path, meta: Mapping[str, Any]) -> None:
    """Raises CheckpointError if `json_path` is a file that does not describe weights."""
    if not json_path.is_file():
        return
    with open(json_path, "rb") as file:
        text = file.read(_MAX_JSON).decode(errors="replace")
    if not describes_weights(text, meta):
        raise CheckpointError(
            f"{path}: its description would replace {json_path.name}, which does not describe weights; take another name"
        )


def read_meta(path: str | os.PathLike) -> dict[str, Any] | None:
    """Reads the JSON next to an npz: normalisation, image size, class names, task, source.

    Returns:
      The object, or None if there is no such file.

    Raises:
      CheckpointError: if the file does not hold such an object.
    """
    json_path = Path(path).with_suffix(".json")
    if not json_path.is_file():
        return None
    with open(json_path, "rb") as file:
        content = file.read(_MAX_JSON + 1)
    if len(content) > _MAX_JSON:
        raise CheckpointError(f"{json_path} has more than {_MAX_JSON} bytes, the limit for a description of weights")
    return parse(content, json_path)


def check_sums(path: Path) -> None:
    """Raises CheckpointError unless every member of an npz has the checksum that the file records."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # zip and zlib each raise their own
        raise CheckpointError(f"{path} is damaged ({reason(error)})") from None
    if damaged:
        raise CheckpointError(f"{path}: {damaged!r} is damaged (wrong checksum)")
