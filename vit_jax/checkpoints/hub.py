"""Copies of published files on the Hugging Face hub: finds or downloads them, and converts them to npz."""

import os
import re
from pathlib import Path

from vit_jax.checkpoints.catalogue import Published
from vit_jax.checkpoints.verification import check_hash, check_tree, max_bytes
from vit_jax.errors import CheckpointError
from vit_jax.fetch import Refused, download
from vit_jax.files import expand_user, locked, sha256
from vit_jax.formats.google import save_npz
from vit_jax.formats.torch_files import read_safetensors


def convert_copy(address: str, target: Path, row: Published) -> Path:
    """Downloads a copy of a published file and converts it to an npz with a JSON next to it.

    Args:
      address: hf://owner/repository/file, one of the row's.
      target: the npz; if it exists, only the hash that the caller demands is checked.
      row: the published file.

    Raises:
      Refused: if the hub does not give the file or it is not a copy of the row's.
      OSError: if a file cannot be written.
    """
    headless = address in row.headless
    with locked(target.with_name(f".{target.name}.lock"), f"downloads {target.name}"):
        if not target.is_file():  # another process may have converted it while this one waited
            source, cached = fetch_file(address, target.with_suffix(".safetensors"), max_bytes(row))
            try:
                params = read_safetensors(source)
                check_tree(source, params, row, headless)
            except CheckpointError as error:
                raise Refused(f"not a copy of {row.name}: {error}") from None
            finally:
                digest = sha256(source)
                if not cached:
                    source.unlink()
            meta = {
                "image_size": row.image_size,
                "source": address,
                "source_sha256": digest,
                "copy_of": row.name,
                "lacks": [name for name in ("head", "pre_logits") if headless and name not in params],
            }
            save_npz(target, params, meta)
        try:
            check_hash(target, row.demanded)
        except CheckpointError as error:
            raise Refused(str(error)) from None
    return target


def fetch_file(address: str, target: Path, limit: int) -> tuple[Path, bool]:
    """Returns the path of a hub file on this machine, downloaded if needed.

    Args:
      address: hf://owner/repository/file.
      target: where a downloaded file is written.
      limit: the largest accepted size in bytes.

    Returns:
      The path, and whether it is in the cache of the hub's own client, which must not be changed.

    Raises:
      Refused: if HF_HUB_OFFLINE is set, or the server does not give the file.
      OSError: if the file cannot be written.
    """
    owner, repository, file = address.removeprefix("hf://").split("/", 2)
    if cached := find_cached(f"{owner}/{repository}", file):
        return cached, True
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise Refused("HF_HUB_OFFLINE is set")
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    return download(f"{endpoint.rstrip('/')}/{owner}/{repository}/resolve/main/{file}", target, most=limit), False


def find_cached(repository: str, file: str) -> Path | None:
    """Finds a file of the newest known commit in the cache of the hub's own client.

    Returns:
      Its path; None if it is not there or damaged.

    Raises:
      UserError: if HF_HUB_CACHE or HF_HOME names the home of a user who does not exist.
    """
    home = os.environ.get("HF_HOME") or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    cache = expand_user(os.environ.get("HF_HUB_CACHE") or f"{home}/hub", "HF_HUB_CACHE or HF_HOME")
    folder = cache / f"models--{repository.replace('/', '--')}"
    try:
        commit = (folder / "refs" / "main").read_text()
        if not re.fullmatch("[0-9a-f]{40}", commit):
            return None
        path = folder / "snapshots" / commit / file
        blob = path.resolve().name  # the client names a large file by its SHA-256
        return path if path.is_file() and (len(blob) != 64 or sha256(path) == blob) else None
    except (OSError, UnicodeDecodeError):
        return None
