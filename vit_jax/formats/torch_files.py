"""The safetensors files of timm and Hugging Face, and the configurations beside them.

The format has no checksums. A file that is written here carries the hash of every tensor in its metadata, and the number of
attention heads, which no tensor tells.
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

from vit_jax.errors import CheckpointError
from vit_jax.files import whole_folder
from vit_jax.formats.torch_configs import check_config, describe, heads_of
from vit_jax.formats.torch_names import from_torch, quoted, tops

_HEADER_LIMIT = 2**20  # bytes; H/14 needs a fifth of it
_DTYPES = ("F32", "F16", "BF16")
_HASHES = "vit_jax.sha256"  # in a header's metadata: a JSON object, tensor → hash


def _digest(name: str, array: np.ndarray, heads: str) -> str:
    """SHA-256 of everything that a tensor stands for: its bytes as stored, and what the header says of them."""
    digest = hashlib.sha256(json.dumps([name, str(array.dtype), list(array.shape), heads]).encode())
    digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


class _Tensors(Mapping[str, np.ndarray]):
    """The tensors of an open safetensors file, each read when it is asked for and checked then."""

    def __init__(self, file: Any, metadata: Mapping[str, str], without: tuple[str, ...]):
        self._file, self._heads = file, metadata.get("num_heads", "")
        self._stored = list(file.offset_keys())  # in the order in which they lie
        self.names = [name for name in self._stored if not name.removeprefix("vit.").startswith(without)]
        self._digests = _json(metadata[_HASHES], "the hashes in its metadata") if _HASHES in metadata else None
        if self._digests is not None and self._digests.keys() != set(self._stored):
            name = min(self._digests.keys() ^ set(self._stored))
            raise CheckpointError(f"its hashes and its tensors differ: {quoted(name)} is in one of them alone")

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, name: str) -> np.ndarray:
        kind = self._file.get_slice(name).get_dtype()
        if kind not in _DTYPES:
            raise CheckpointError(f"{quoted(name)} has type {kind}, expected {', '.join(_DTYPES[:-1])} or {_DTYPES[-1]}")
        stored = self._file.get_tensor(name)
        if self._digests is not None and self._digests[name] != _digest(name, stored, self._heads):
            raise CheckpointError(f"{quoted(name)} is not what was written: its hash is another; copy the file again")
        array = stored.astype(np.float32, copy=False)
        if array.size and not np.isfinite([array.min(), array.max()]).all():
            raise CheckpointError(f"{quoted(name)} holds values that are not finite")
        return array


def _json(text: str, what: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} are no JSON ({error})") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{what} are no JSON object")
    return found


def _beside(path: Path, name: str) -> dict[str, Any]:
    """The JSON of that name beside a file; empty where there is none."""
    beside = path.with_name(name)
    if not beside.is_file():
        return {}
    try:
        return _json(beside.read_text(encoding="utf-8"), f"the contents of {name} beside it")
    except UnicodeDecodeError:
        raise CheckpointError(f"the contents of {name} beside it are no JSON (not text)") from None


def stored_types(path: str | os.PathLike) -> list[str]:
    """The types in a safetensors file, as NumPy calls them; CheckpointError as `read_safetensors`."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    _check_header(path)
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    try:
        with safe_open(path, framework="numpy") as file:
            found = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (it is no dictionary)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is no safetensors file, or is damaged ({error})") from None
    return sorted(names.get(kind, kind) for kind in found)


def read_config(path: str | os.PathLike) -> dict[str, Any]:
    """What config.json and preprocessor_config.json beside a safetensors file say, in the terms of the JSON beside an npz.

    "image_size", "normalization" and "class_names", each if it is given. CheckpointError for what is no JSON or of no use.
    """
    path = Path(path)
    try:
        return describe(_beside(path, "config.json"), _beside(path, "preprocessor_config.json"))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _check_header(path: Path) -> None:
    """Everything about a safetensors file that can be told from its first eight bytes."""
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder, expected a safetensors file")
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        raise CheckpointError(f"{path} is no safetensors file, or is cut short; download it again")
    if length > _HEADER_LIMIT:
        raise CheckpointError(f"{path} has a header of {length} bytes, no Vision Transformer needs more than {_HEADER_LIMIT}")


def read_safetensors(path: str | os.PathLike, skip: tuple[str, ...] = ()) -> dict[str, Any]:
    """The parameter tree of a timm or Hugging Face safetensors file: nested dicts of float32 arrays under Google's names.

    Float32, float16 and bfloat16 are read. Modules named in `skip` ("head", "pre_logits") are not read from disk. The number
    of attention heads comes from the metadata that `save_timm` and `save_huggingface` write, else from the config.json
    beside the file, else from the table of variants. Hashes that those two wrote are checked, tensor by tensor; files of
    other makers carry none. Raises CheckpointError with the file and the tensor it is about.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    _check_header(path)
    try:
        # Reading rather than mapping: a mapped file counts as memory as well.
        with safe_open(path, framework="numpy", backend="pread") as file:
            metadata = file.metadata() or {}
            without = tuple(f"{name}." for module in skip for name in tops(module))
            tensors = _Tensors(file, metadata, without)
            said = metadata.get("num_heads", "")
            if said and not re.fullmatch(r"[1-9]\d{0,3}", said):
                raise CheckpointError(f"its metadata says that there are {quoted(said)} attention heads")
            config = _beside(path, "config.json")
            check_config(config, any(name.rpartition(".")[2] == "cls_token" for name in tensors.names))
            heads = int(said) if said else heads_of(config)
            return from_torch(tensors, heads, skip)
    except (SafetensorError, OSError) as error:
        reason = "".join(filter(str.isprintable, " ".join(str(error)[:200].split())))  # it may quote the file
        raise CheckpointError(f"{path} is no safetensors file, or is damaged ({reason})") from None
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def save_folder(
    folder: str | os.PathLike, tensors: dict[str, np.ndarray], heads: int, dtype: Any, texts: Mapping[str, dict[str, Any]]
) -> None:
    """A folder with the tensors, what is needed to read them back, and the texts; whole or not at all."""
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
            save_file(tensors, scratch / "model.safetensors", metadata=metadata)
        except SafetensorError as error:  # what the disk refuses comes as words
            number = re.search(r"os error (\d+)", str(error))
            code = int(number[1]) if number else errno.EIO
            raise OSError(code, os.strerror(code)) from error
        for name, text in written.items():
            (scratch / name).write_text(text, encoding="utf-8")
        # Its library lets nobody but the owner read what it writes.
        shutil.copymode(scratch / "config.json", scratch / "model.safetensors")
