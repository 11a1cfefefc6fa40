"""The safetensors files of timm and Hugging Face, and the configuration files next to them.

The format has no checksums. A file that this package writes has in its metadata the hash of every tensor, and the number of
attention heads, which the tensors do not show.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from vit_jax.errors import CheckpointError, reason
from vit_jax.files import whole_folder
from vit_jax.formats.torch_configs import check_config, describe, heads_of
from vit_jax.formats.torch_names import from_torch, short_repr, torch_module_names

TENSORS_FILE = "model.safetensors"  # its name in a folder of timm or transformers
_MAX_HEADER = 2**20  # bytes; H/14 needs a fifth of it
_DTYPES = ("F32", "F16", "BF16")
_HASHES = "vit_jax.sha256"  # key of the metadata: a JSON object, tensor → hash


def _digest(name: str, array: np.ndarray, heads: str) -> str:
    """Returns the SHA-256 of a tensor: its bytes as stored, its name, type and shape, and the number of heads."""
    digest = hashlib.sha256(json.dumps([name, str(array.dtype), list(array.shape), heads]).encode())
    digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


class _Tensors(Mapping[str, np.ndarray]):
    """The tensors of an open safetensors file. Each is read and checked when it is accessed."""

    def __init__(self, file: Any, metadata: Mapping[str, str], without: tuple[str, ...]):
        self._file, self._heads = file, metadata.get("num_heads", "")
        self._stored = list(file.offset_keys())  # in the order of their offsets
        self.names = [name for name in self._stored if not name.removeprefix("vit.").startswith(without)]
        self._digests = _json(metadata[_HASHES], f"{_HASHES} in its metadata") if _HASHES in metadata else None
        if self._digests is not None and self._digests.keys() != set(self._stored):
            name = min(self._digests.keys() ^ set(self._stored))
            raise CheckpointError(f"the hashes and the tensors have different names: only one of them has {short_repr(name)}")

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, name: str) -> np.ndarray:
        kind = self._file.get_slice(name).get_dtype()
        if kind not in _DTYPES:
            raise CheckpointError(f"{short_repr(name)} has type {kind}, expected {', '.join(_DTYPES[:-1])} or {_DTYPES[-1]}")
        stored = self._file.get_tensor(name)
        if self._digests is not None and self._digests[name] != _digest(name, stored, self._heads):
            raise CheckpointError(
                f"{short_repr(name)} is damaged (its hash differs from the recorded one); copy the file again"
            )
        array = stored.astype(np.float32, copy=False)
        if array.size and not np.isfinite([array.min(), array.max()]).all():
            raise CheckpointError(f"{short_repr(name)} holds values that are not finite")
        return array


def _json(text: str, what: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is not JSON ({error})") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{what} should be a JSON object")
    return found


def _read_json_next_to(path: Path, name: str) -> dict[str, Any]:
    """Reads the JSON file of that name next to a file; returns an empty object if there is none."""
    json_path = path.with_name(name)
    if not json_path.is_file():
        return {}
    try:
        return _json(json_path.read_text(encoding="utf-8"), f"{name} next to it")
    except UnicodeDecodeError:
        raise CheckpointError(f"{name} next to it is not JSON (not UTF-8 text)") from None


def stored_types(path: str | os.PathLike) -> list[str]:
    """Returns the sorted NumPy names of the types in a safetensors file.

    Raises:
      CheckpointError: as `read_safetensors`.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    _check_header(path)
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    try:
        with safe_open(path, framework="numpy") as file:
            found = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (not a dictionary)
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from None
    return sorted(names.get(kind, kind) for kind in found)


def read_config(path: str | os.PathLike) -> dict[str, Any]:
    """Reads config.json and preprocessor_config.json next to a safetensors file as the fields of the JSON next to an npz.

    Returns:
      "image_size", "normalization", "eval_crop" and "class_names", each if it is given.

    Raises:
      CheckpointError: if a file is not JSON or a field cannot be used.
    """
    path = Path(path)
    try:
        return describe(_read_json_next_to(path, "config.json"), _read_json_next_to(path, "preprocessor_config.json"))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _check_header(path: Path) -> None:
    """Raises CheckpointError if the path or the first eight bytes show that it is not a safetensors file of weights."""
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder, expected a safetensors file")
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        raise CheckpointError(f"{path} is not a safetensors file or is truncated; download it again")
    if length > _MAX_HEADER:
        raise CheckpointError(f"{path} has a header of {length} bytes, at most {_MAX_HEADER} are allowed")


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} is not a safetensors file or is damaged ({reason(error)}); download it again")


def read_safetensors(path: str | os.PathLike, skip: tuple[str, ...] = ()) -> dict[str, Any]:
    """Reads the parameter tree of a timm or Hugging Face safetensors file.

    The number of attention heads comes from the metadata that `save_timm` and `save_huggingface` write, else from the
    config.json next to the file, else from the table of variants. The hashes that these two write are checked for every
    tensor; files from other tools have none.

    Args:
      path: the file; its tensors are float32, float16 or bfloat16.
      skip: names of modules ("head", "pre_logits") that are not read from disk.

    Returns:
      Nested dicts of float32 NumPy arrays under Google's names.

    Raises:
      CheckpointError: if the file cannot be read or holds another model; the message names the file and the tensor.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    _check_header(path)
    try:
        # Reads instead of mapping, because a mapped file counts as memory, too.
        with safe_open(path, framework="numpy", backend="pread") as file:
            metadata = file.metadata() or {}
            without = tuple(f"{name}." for module in skip for name in torch_module_names(module))
            tensors = _Tensors(file, metadata, without)
            stated = metadata.get("num_heads", "")
            if stated and not re.fullmatch(r"[1-9]\d{0,3}", stated):
                raise CheckpointError(f"num_heads in its metadata is {short_repr(stated)}, expected a positive integer")
            config = _read_json_next_to(path, "config.json")
            check_config(config, any(name.rpartition(".")[2] == "cls_token" for name in tensors.names))
            heads = int(stated) if stated else heads_of(config)
            return from_torch(tensors, heads, skip)
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from None
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def save_folder(
    folder: str | os.PathLike, tensors: dict[str, np.ndarray], heads: int, dtype: Any, texts: Mapping[str, dict[str, Any]]
) -> None:
    """Writes a folder with the tensors and JSON files; it appears whole or not at all.

    Args:
      folder: does not exist yet, or is empty.
      tensors: under PyTorch's names; replaced by arrays of `dtype`.
      heads: the number of attention heads.
      dtype: float32 or bfloat16.
      texts: a JSON file's name → its object.

    Raises:
      ValueError: for another dtype.
      OSError: if the folder cannot be written or holds something (FileExistsError).
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    if np.dtype(dtype) not in (np.float32, ml_dtypes.bfloat16):
        raise ValueError(f"weights are saved as float32 or bfloat16, not {np.dtype(dtype)}")
    for name in tensors:
        tensors[name] = tensors[name].astype(dtype, copy=False)
    hashes = {name: _digest(name, array, str(heads)) for name, array in tensors.items()}
    metadata = {"format": "pt", "num_heads": str(heads), _HASHES: json.dumps(hashes)}
    written = {name: json.dumps(text, indent=2, ensure_ascii=False) + "\n" for name, text in texts.items()}
    with whole_folder(Path(folder)) as scratch:
        try:
            save_file(tensors, scratch / TENSORS_FILE, metadata=metadata)
        except SafetensorError as error:  # an error of the disk comes as text
            number = re.search(r"os error (\d+)", str(error))
            code = int(number[1]) if number else errno.EIO
            raise OSError(code, os.strerror(code)) from error
        for name, text in written.items():
            (scratch / name).write_text(text, encoding="utf-8")
        # The library makes its file readable by the owner only.
        shutil.copymode(scratch / "config.json", scratch / TENSORS_FILE)
