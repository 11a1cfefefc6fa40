"""Google's npz files: read in every form they come in, written in the one that was published.

On disk a checkpoint is a zip of arrays with '/'-joined names; unflattened, those names are the parameter tree. Forms
that other versions of the original and of big_vision wrote are brought to the published names on reading (the original's
vit_jax/checkpoint.py; big_vision's models/vit.py).
"""

import json
import os
import re
import zipfile
from collections.abc import Iterable, Mapping
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


def _members(path: Path) -> dict[str, str]:
    """Array name → member name of an npz, after everything that can be told without reading an array."""
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder, expected an npz file")
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    if not path.stat().st_size:
        raise CheckpointError(f"{path} is empty; download it again")
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"{path} is no npz, or is cut short ({error}); download it again") from None
    odd = [name for name in names if not name.endswith(".npy")]
    if odd or not names:
        raise CheckpointError(f"{path} is a zip but no npz of weights: it holds {odd[0] if odd else 'nothing'}")
    if len(set(names)) != len(names):
        raise CheckpointError(f"{path} holds {next(n for n in names if names.count(n) > 1)} twice")
    return {name[: -len(".npy")]: name for name in names}


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


def _array(archive: np.lib.npyio.NpzFile, name: str, path: Path) -> np.ndarray:
    """One member as a float32 array of finite values."""
    try:
        array = archive[name]
    except Exception as error:  # zip, zlib, NumPy and its header's parser each raise their own
        if "allow_pickle" in str(error):
            raise CheckpointError(f"{path}: {name} is a pickled object, which is never loaded") from None
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(f"{path}: {name} cannot be read ({reason}); download the file again") from None
    if not isinstance(array, np.ndarray):
        raise CheckpointError(f"{path}: {name} is not an array")
    if array.dtype == np.dtype("V2"):  # NumPy writes bfloat16 as two bytes without a meaning
        array = array.view(ml_dtypes.bfloat16)
    elif array.dtype.kind != "f":
        raise CheckpointError(f"{path}: {name} has type {array.dtype}, expected floating point numbers")
    array = np.asarray(array, np.float32)
    # Least and largest carry a NaN along and make no temporary array as isfinite would.
    if array.size and not np.isfinite([array.min(), array.max()]).all():
        raise CheckpointError(f"{path}: {name} holds values that are not finite")
    return array


def _unstack(flat: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Blocks stacked by scan, leading axis the layer, as blocks of their own."""
    result = {}
    for name, array in flat.items():
        if "/encoderblock/" in name:
            for i, layer in enumerate(array):
                result[name.replace("/encoderblock/", f"/encoderblock_{i}/")] = layer
        else:
            result[name] = array
    return result


def _published(name: str) -> str:
    return "/".join(_PUBLISHED_NAMES.get(part, part) for part in name.split("/"))


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
    with np.load(path, allow_pickle=False) as archive:
        for name in members:
            short = name.removeprefix(prefix)
            if not name.startswith(prefix) or short.split("/")[0] in skip:
                continue
            flat[short] = _array(archive, name, path)
    if spelling.endswith("scan-stacked"):
        flat = _unstack(flat)
    if not spelling.endswith("published"):
        flat = {_published(name): array for name, array in flat.items()}
    for name, array in flat.items():
        if re.search(r"(^|/)gn\w+/(scale|bias)$", name) and array.shape[:-1] == (1, 1, 1):
            flat[name] = array.reshape(-1)
    if "pos_embedding" in flat:  # big_vision's: at the top, without a row for the class token
        positions = flat.pop("pos_embedding")
        if "cls" in flat and positions.ndim == 3:
            positions = np.concatenate([np.zeros_like(positions[:, :1]), positions], axis=1)
        flat[_POSITIONS] = positions
    for name in flat:
        above = name.split("/")[:-1]
        if inside := next((part for i in range(len(above)) if (part := "/".join(above[: i + 1])) in flat), None):
            raise CheckpointError(f"{path}: {inside} is an array and has {name} below it")
    return unflatten_dict(flat, sep="/")


def save_npz(
    path: str | os.PathLike, params: Mapping[str, Any], meta: Mapping[str, Any] | None = None, dtype: Any = np.float32
) -> None:
    """Writes a parameter tree in the published form, and `meta` as JSON into the file of the same name beside it.

    `dtype` is float32 as published, which the original, timm and `load` read, or bfloat16 for half the size, which `load`
    reads. Each file is put in place whole by a rename: whatever was there before stays until then.
    """
    path = Path(path)
    flat = {}
    for name, leaf in flatten_dict(dict(params), sep="/").items():
        array = np.asarray(leaf).astype(dtype)
        flat[name] = array.reshape(1, 1, 1, -1) if re.search(r"(^|/)gn\w+/(scale|bias)$", name) else array
    path.parent.mkdir(parents=True, exist_ok=True)

    def place(target: Path, write) -> None:
        scratch = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            with open(scratch, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(scratch, target)
        finally:
            scratch.unlink(missing_ok=True)

    beside = path.with_suffix(".json")
    if meta is None:
        beside.unlink(missing_ok=True)  # it would speak of the weights that were here before
    place(path, lambda file: np.savez(file, **flat))  # type: ignore[arg-type]
    if meta is not None:
        place(beside, lambda file: file.write((json.dumps(dict(meta), indent=2) + "\n").encode()))


def read_meta(path: str | os.PathLike) -> dict[str, Any] | None:
    """The JSON beside an npz, or None where there is none: normalisation, image size, class names, task, source."""
    beside = Path(path).with_suffix(".json")
    if not beside.is_file():
        return None
    try:
        return json.loads(beside.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{beside} is not JSON: {error}") from None
