"""Finds published files by name and downloads them to the cache on first use.

The cache ($VIT_JAX_CACHE, else the user's cache folder) has the layout of Google's bucket. Copies from the Hugging Face hub
are converted to npz and stored in `copies`, because they may have no head. A file appears in the cache when it is whole
and checked. Until then it grows in a hidden file next to its final path, from which a later try continues.
"""

import dataclasses
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from vit_jax.checkpoints import catalogue, hub
from vit_jax.checkpoints.catalogue import BUCKET, PUBLISHED, Published, resolve, split_demanded
from vit_jax.checkpoints.verification import check_file, check_hash, check_tree, max_bytes
from vit_jax.errors import CheckpointError, UserError, printable, reason
from vit_jax.fetch import Refused, Unreachable, download
from vit_jax.files import BEST_WEIGHTS, FINAL_WEIGHTS, cache_root, expand_user
from vit_jax.formats.google import check_sums, read_meta, read_shapes
from vit_jax.formats.torch_files import TENSORS_FILE

_log = logging.getLogger("vit_jax")

RUN_WEIGHTS = (FINAL_WEIGHTS, BEST_WEIGHTS)  # a run's weights; the first that exists is used
FOLDER_WEIGHTS = (*RUN_WEIGHTS, TENSORS_FILE)  # those of a run or of an exported folder
_MAX_INDEX = 2**28  # bytes of AugReg's index.csv, which has 51,509 rows


def find(source: str | os.PathLike, complete: bool = False) -> Path:
    """Returns the file of weights for a path or a published name.

    Args:
      source: an existing file; a folder, whose first file of `FOLDER_WEIGHTS` is used; or a name, whose file is downloaded if
        needed. With "@sha256:HEX" at its end the file must have this hash.
      complete: as for `fetch`.

    Raises:
      CheckpointError: if a folder has no weights, a name is unknown, or a file cannot be downloaded.
    """
    source, demanded = split_demanded(os.fspath(source))
    try:
        path = expand_user(source, "checkpoint")
    except UserError as error:
        raise CheckpointError(str(error)) from None
    try:
        if path.is_file():
            return check_hash(path, demanded)
        folder = path.is_dir()
    except OSError:  # the name is too long for a path
        folder = False
    if folder:
        for name in FOLDER_WEIGHTS:
            if (path / name).is_file():
                return check_hash(path / name, demanded)
    try:
        row = dataclasses.replace(resolve(source), demanded=demanded)
    except CheckpointError as error:
        if folder:
            raise CheckpointError(
                f"{path} is a folder without weights: it has none of {', '.join(FOLDER_WEIGHTS)}; name the file"
            ) from None
        if len(source) > 200 or source.startswith(("/", ".", "~")):  # no published name is like this
            raise CheckpointError(f"there is no file {source[:200]}") from None
        raise CheckpointError(f"there is no file {source}, and {error}") from None
    found = fetch(row, complete=complete)
    if source.removesuffix(".npz") != row.name:
        _log.warning("%s is %s, stored as %s", source, row.name, found)
    if missing := (read_meta(found) or {}).get("lacks"):
        _log.warning("it is a copy without %s", " and ".join(missing))
    return found


def fetch(published: Published | str, cache: str | os.PathLike | None = None, complete: bool = False) -> Path:
    """Returns the npz of a published file on this machine, downloaded if it is not in the cache.

    The addresses are tried in their order, first $VIT_JAX_MIRROR: a folder or a server with the layout of the bucket. A local
    file is used in place. Size, hash and checksums are checked if they are known; architecture, resolution and number of
    classes always.

    Args:
      published: a row of PUBLISHED or a name that `resolve` accepts.
      cache: the folder of downloaded files; None: `cache_root`.
      complete: whether the file must have its own head and pre_logits. If False, a copy without them is accepted, which is
        enough for fine-tuning and features.

    Raises:
      CheckpointError: if no address gives the file (the message has each address and its answer), or a file in the cache is
        not the expected one.
    """
    row = resolve(published) if isinstance(published, str) else published
    root = Path(cache) if cache else cache_root()
    for path, address in _cache_paths(row, root, complete):
        if path.is_file():
            try:
                if address:
                    check_hash(path, row.demanded)
                    check_tree(path, read_shapes(path), row, address in row.headless)
                else:
                    check_file(path, row)
            except CheckpointError as error:
                raise CheckpointError(f"{error}; remove this file from the cache to download it again") from None
            return path

    def fetch_from(address: str) -> Path:
        if complete and address in row.headless:
            raise Refused("this copy has no head, which is needed; give num_classes (0 for features) to use the copy")
        target = _cache_path(address, row, root)
        if address.startswith("hf://"):
            return hub.convert_copy(address, target, row)
        return _download(address, target, lambda path: check_file(path, row), row.size, max_bytes(row))

    on_hub = any(address.startswith("hf://") for address in row.addresses)
    others = [
        other.name
        for other in PUBLISHED.values()
        if not on_hub and (other.variant, other.num_classes) == (row.variant, row.num_classes) and len(other.addresses) > 1
    ]
    hint = f"; the hub has similar files from other trainings: {', '.join(others)}" if others else ""
    return _first_success(_addresses(row.name + ".npz", row.addresses), fetch_from, row.name + ".npz", hint)


def local(published: Published, cache: str | os.PathLike | None = None) -> Path | None:
    """Returns the path of a published file, or of a converted copy, that is on this machine; downloads and checks nothing."""
    paths = [path for path, _ in _cache_paths(published, Path(cache) if cache else cache_root(), complete=False)]
    addresses = _addresses(published.name + ".npz", published.addresses)
    paths += [_local_path(address) for address in addresses if address.startswith("file:")]
    return next((path for path in paths if path.is_file()), None)


def fetch_index(cache: str | os.PathLike | None = None) -> Path:
    """Returns the path of AugReg's index.csv on this machine, downloaded if needed.

    Raises:
      CheckpointError: as `fetch`.
    """
    name = "augreg/index.csv"
    path = (Path(cache) if cache else cache_root()) / name
    if path.is_file():
        return path

    def check(arrived: Path) -> None:
        if not any(True for _ in catalogue.read_index(arrived)):
            raise CheckpointError(f"{arrived} has no rows")

    def fetch_from(address: str) -> Path:
        return _download(address, path, check, None, _MAX_INDEX)

    return _first_success(_addresses(name, (f"{BUCKET}/{name}",)), fetch_from, name, "")


def best(name: str, ds: str = "i21k", index: str | os.PathLike | None = None) -> Published:
    """Returns `catalogue.best` for an index.csv, which is downloaded if none is given."""
    return catalogue.best(index or fetch_index(), name, ds)


def _addresses(name: str, addresses: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the addresses in the order in which they are tried, the user's mirror first."""
    mirror = os.environ.get("VIT_JAX_MIRROR")
    if not mirror or addresses[0].startswith("file:"):  # no mirror has the file that is part of the package
        return addresses
    root = mirror if "://" in mirror else expand_user(mirror, "VIT_JAX_MIRROR").absolute().as_uri()
    return (f"{root.rstrip('/')}/{quote(name)}", *addresses)


def _local_path(address: str) -> Path:
    return Path(unquote(urlsplit(address).path))


def _cache_path(address: str, row: Published, root: Path) -> Path:
    """Returns the path in the cache for what an address gives."""
    if address.startswith("hf://"):
        return root / "copies" / f"{address.removeprefix('hf://').rpartition('/')[0]}.npz"
    return root / f"{row.name}.npz"


def _cache_paths(row: Published, root: Path, complete: bool) -> Iterator[tuple[Path, str]]:
    """Yields (path, address) of the files in the cache that may be used: the npz itself with "", then the converted copies."""
    yield root / f"{row.name}.npz", ""
    for address in row.addresses:
        if address.startswith("hf://") and not (complete and address in row.headless):
            yield _cache_path(address, row, root), address


def _first_success(addresses: tuple[str, ...], fetch_from: Callable[[str], Path], name: str, hint: str) -> Path:
    """Returns the result of the first address that succeeds; raises CheckpointError with every answer if none does."""
    answers = []
    remote, unreachable = 0, 0
    for address in addresses:
        remote += not address.startswith("file:")
        try:
            return fetch_from(address)
        except Refused as error:
            answers.append(f"{printable(address)}: {error}")
            unreachable += isinstance(error, Unreachable)
            _log.info("%s", answers[-1])
        except OSError as error:  # from the disk; failures of a server are Refused
            raise CheckpointError(
                f"{name} cannot be stored on this machine ({reason(error)}: {error.filename}); free some space, or set "
                "VIT_JAX_CACHE to another folder"
            ) from error
    offline = "no network: " if remote and unreachable == remote else ""
    advice = "get the file another way and give its path"
    if any(address.startswith(BUCKET) for address in addresses):
        advice = (
            f"get the file another way, such as `gcloud storage cp gs://vit_models/{name} .` with a Google account, and give "
            "its path, or set VIT_JAX_MIRROR to a folder or server with the layout of gs://vit_models"
        )
    short = name.rpartition("/")[2].removesuffix(".npz")
    raise CheckpointError(f"{offline}{short} could not be downloaded: {advice}{hint}; tried: {'; '.join(answers)}")


def _download(address: str, target: Path, check: Callable[[Path], None], size: int | None, limit: int) -> Path:
    """Returns the checked file of an address: a local file in place, any other as `target` with its checksums verified."""
    if address.startswith("file:"):
        path = _local_path(address)
        if not path.is_file():
            raise Refused("there is no such file")
        try:
            check(path)
        except UserError as error:
            raise Refused(f"it is not the expected file: {error}") from None
        return path
    if not address.startswith(("http://", "https://")):
        raise Refused("unknown kind of address, expected a path, file://, http:// or https://")

    def check_arrived(path: Path) -> None:
        check(path)
        if target.suffix == ".npz":
            check_sums(path)

    return download(address, target, size, limit, check_arrived)
