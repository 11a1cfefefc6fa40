"""Published files, brought here on first use and found again after that.

The cache ($VIT_JAX_CACHE, else the user's cache folder) is laid out as Google's bucket is; what was converted from a copy on
the Hugging Face hub lies apart, in `copies`, for it may lack the head. A file appears in the cache when it is whole and
checked, by a rename. Until then it grows in a hidden file next to its place, from which a later try goes on.
"""

import dataclasses
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from vit_jax.checkpoints import catalogue
from vit_jax.checkpoints.catalogue import BUCKET, PUBLISHED, Published, resolve, split_demanded
from vit_jax.errors import CheckpointError, UserError, printable, reason
from vit_jax.fetch import Refused, Unreachable, download
from vit_jax.files import cache_root, expand_user, locked, sha256
from vit_jax.formats.google import check_sums, read_meta, read_shapes, save_npz
from vit_jax.formats.torch_files import read_safetensors
from vit_jax.models.variants import build, from_tree, patches

_log = logging.getLogger("vit_jax")

_INDEX_MOST = 2**28  # bytes of AugReg's index.csv that are accepted; it has 51,509 rows


def find(source: str | os.PathLike, complete: bool = False) -> Path:
    """The file that `source` stands for: an existing file or folder, else a published name, whose file is fetched.

    A folder stands for the weights in it: a run's `final.npz`, before there is one its `best.npz`, an exported folder's
    `model.safetensors`. For `complete` see `fetch`. CheckpointError for a folder without weights, for a name that means
    nothing, and for a file that cannot be had.
    """
    source, demanded = split_demanded(os.fspath(source))
    try:
        path = expand_user(source, "checkpoint")
    except UserError as error:
        raise CheckpointError(str(error)) from None
    try:
        if path.is_file():
            return _demand(path, demanded)
        folder = path.is_dir()
    except OSError:  # a name too long to be one
        folder = False
    if folder:
        for name in ("final.npz", "best.npz", "model.safetensors"):
            if (path / name).is_file():
                return _demand(path / name, demanded)
    try:
        row = dataclasses.replace(resolve(source), demanded=demanded)
    except CheckpointError as error:
        if folder:
            raise CheckpointError(
                f"{path} is a folder without weights: it holds neither final.npz nor best.npz, as a run's does, nor "
                "model.safetensors, as an exported one does; name the file"
            ) from None
        if len(source) > 200 or source.startswith(("/", ".", "~")):  # which no published name is or does
            raise CheckpointError(f"there is no file {source[:200]}") from None
        raise CheckpointError(f"there is no file {source}, and {error}") from None
    found = fetch(row, complete=complete)
    if source.removesuffix(".npz") != row.name:
        _log.warning("%s is %s, here as %s", source, row.name, found)
    if lacks := (read_meta(found) or {}).get("lacks"):
        _log.warning("it is a copy without %s", " and ".join(lacks))
    return found


def _demand(path: Path, demanded: str | None) -> Path:
    """The path; CheckpointError unless its file has the SHA-256 that is demanded, if one is."""
    if demanded and (found := sha256(path)) != demanded:
        raise CheckpointError(f"{path} has the SHA-256 {found}, demanded is {demanded}")
    return path


def fetch(published: Published | str, cache: str | os.PathLike | None = None, complete: bool = False) -> Path:
    """The npz of a published file on this machine, downloaded where it is not here yet.

    Args:
      published: a row of PUBLISHED or a name that `resolve` takes.
      cache: the folder to keep files in; None: `cache_root`.
      complete: with the file's own head and pre_logits. Else a copy without them, which is good for fine-tuning and for
        features, will do.

    Addresses are tried in their order, before them $VIT_JAX_MIRROR: a folder or a server laid out as the bucket is. A file
    on this machine is used where it lies. Size, hash and checksums are checked where they are known, and that the arrays
    are those of the row's architecture, resolution and classes.

    Raises CheckpointError with every address and its answer, or where a file in the cache is not the one it should be.
    """
    row = resolve(published) if isinstance(published, str) else published
    root = Path(cache) if cache else cache_root()
    for path, address in _places(row, root, complete):
        if path.is_file():
            try:
                if address:
                    _demand(path, row.demanded)
                    _check_tree(path, read_shapes(path), row, address in row.headless)
                else:
                    _check(path, row)
            except CheckpointError as error:
                raise CheckpointError(f"{error}; remove that file from the cache, and it is fetched again") from None
            return path

    def take(address: str) -> Path:
        if complete and address in row.headless:
            raise Refused("a copy without the head, which was asked for: give num_classes (0 for features) to do without")
        if address.startswith("hf://"):
            return _converted(address, row, root)
        return _download(address, _place(address, row, root), lambda path: _check(path, row), row.size, _most(row))

    here = any(address.startswith("hf://") for address in row.addresses)
    others = [
        other.name
        for other in PUBLISHED.values()
        if not here and (other.variant, other.num_classes) == (row.variant, row.num_classes) and len(other.addresses) > 1
    ]
    besides = f"; of another training, the hub has {' and '.join(others)}" if others else ""
    return _first(_addresses(row.name + ".npz", row.addresses), take, row.name + ".npz", besides)


def local(published: Published, cache: str | os.PathLike | None = None) -> Path | None:
    """Where a published file, or a converted copy of it, lies on this machine already; nothing is fetched or checked."""
    places = [path for path, _ in _places(published, Path(cache) if cache else cache_root(), complete=False)]
    addresses = _addresses(published.name + ".npz", published.addresses)
    places += [_local_path(address) for address in addresses if address.startswith("file:")]
    return next((path for path in places if path.is_file()), None)


def fetch_index(cache: str | os.PathLike | None = None) -> Path:
    """AugReg's index.csv on this machine, downloaded where it is not here yet; CheckpointError as `fetch`."""
    name = "augreg/index.csv"
    path = (Path(cache) if cache else cache_root()) / name
    if path.is_file():
        return path

    def check(arrived: Path) -> None:
        if not any(True for _ in catalogue.read_index(arrived)):
            raise CheckpointError(f"{arrived} has no rows")

    def take(address: str) -> Path:
        return _download(address, path, check, None, _INDEX_MOST)

    return _first(_addresses(name, (f"{BUCKET}/{name}",)), take, name, "")


def best(name: str, ds: str = "i21k", index: str | os.PathLike | None = None) -> Published:
    """`catalogue.best`, its index fetched where none is given."""
    return catalogue.best(index or fetch_index(), name, ds)


def _addresses(name: str, addresses: tuple[str, ...]) -> tuple[str, ...]:
    """The addresses to try in their order, the user's mirror first."""
    mirror = os.environ.get("VIT_JAX_MIRROR")
    if not mirror or addresses[0].startswith("file:"):  # what lies inside the package, no mirror has
        return addresses
    root = mirror if "://" in mirror else expand_user(mirror, "VIT_JAX_MIRROR").absolute().as_uri()
    return (f"{root.rstrip('/')}/{quote(name)}", *addresses)


def _local_path(address: str) -> Path:
    return Path(unquote(urlsplit(address).path))


def _place(address: str, row: Published, root: Path) -> Path:
    """Where in the cache what comes from an address belongs."""
    if address.startswith("hf://"):
        return root / "copies" / f"{address.removeprefix('hf://').rpartition('/')[0]}.npz"
    return root / f"{row.name}.npz"


def _places(row: Published, root: Path, complete: bool) -> Iterator[tuple[Path, str]]:
    """The files in the cache that would serve: the npz itself, then each converted copy with its address."""
    yield root / f"{row.name}.npz", ""
    for address in row.addresses:
        if address.startswith("hf://") and not (complete and address in row.headless):
            yield _place(address, row, root), address


def _first(addresses: tuple[str, ...], take: Callable[[str], Path], name: str, besides: str) -> Path:
    """What the first address gives that gives anything; CheckpointError with what each of them answered."""
    answers = []
    remote, unreachable = 0, 0
    for address in addresses:
        remote += not address.startswith("file:")
        try:
            return take(address)
        except Refused as error:
            answers.append(f"{printable(address)}: {error}")
            unreachable += isinstance(error, Unreachable)
            _log.info("%s", answers[-1])
        except OSError as error:  # the disk's; what a server does is a refusal
            raise CheckpointError(
                f"{name} cannot be kept on this machine ({reason(error)}: {error.filename}); make room, or set VIT_JAX_CACHE "
                "to another folder"
            ) from error
    offline = "no network: " if remote and unreachable == remote else ""
    ways = "get it in another way and give its path"
    if any(address.startswith(BUCKET) for address in addresses):
        ways = (
            f"get it in another way, such as `gcloud storage cp gs://vit_models/{name} .` with a Google account, and give its "
            "path, or set VIT_JAX_MIRROR to a folder or server laid out as gs://vit_models is"
        )
    short = name.rpartition("/")[2].removesuffix(".npz")
    raise CheckpointError(f"{offline}{short} could not be downloaded: {ways}{besides}; tried: {'; '.join(answers)}")


def _check(path: Path, row: Published) -> None:
    """CheckpointError unless the npz is the row's: size and hash where they are known, and what the headers tell."""
    if row.size and (size := path.stat().st_size) != row.size:
        raise CheckpointError(f"{path} has {size} bytes, {row.name} has {row.size}")
    if row.sha256 and (found := sha256(path)) != row.sha256:
        raise CheckpointError(f"{path} has the SHA-256 {found}, {row.name} has {row.sha256}")
    _demand(path, row.demanded)
    _check_tree(path, read_shapes(path), row)


def _most(row: Published) -> int:
    """The most bytes that are accepted for a file of unknown size: a tenth and 1 MiB more than its parameters need."""
    return int(1.1 * row.mib * 2**20) + 2**20


def _check_tree(path: Path, tree: dict[str, Any], row: Published, headless: bool = False) -> None:
    """CheckpointError unless architecture, classes (or none, where `headless`) and resolution are the row's."""
    wanted = build(row.variant)
    try:
        model = from_tree(tree)
        rows = patches(model, tree)
    except (ValueError, KeyError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{path} holds no Vision Transformer: {error}") from None
    for field in ("patch_size", "hidden_size", "num_layers", "num_heads", "mlp_dim", "resnet"):
        found, expected = getattr(model, field), getattr(wanted, field)
        if found != expected:
            raise CheckpointError(f"{path} is not the {row.variant} of {row.name}: {field} is {found}, expected {expected}")
    if model.num_classes != row.num_classes and not (headless and not model.num_classes):
        raise CheckpointError(f"{path} has a head of {model.num_classes} classes, that of {row.name} has {row.num_classes}")
    if rows != (row.image_size // model.stride) ** 2:
        raise CheckpointError(f"{path} has positions for {rows} patches, {row.name} was trained at {row.image_size} pixels")


def _download(address: str, target: Path, check: Callable[[Path], None], size: int | None, most: int) -> Path:
    """The file at an address: a local one where it lies, any other as `target`; checked, and on arrival read through."""
    if address.startswith("file:"):
        path = _local_path(address)
        if not path.is_file():
            raise Refused("there is no such file")
        try:
            check(path)
        except UserError as error:
            raise Refused(f"not that file: {error}") from None
        return path
    if not address.startswith(("http://", "https://")):
        raise Refused("not an address of a kind known here: a path, file://, http:// or https://")

    def check_arrived(path: Path) -> None:
        check(path)
        if target.suffix == ".npz":
            check_sums(path)

    return download(address, target, size, most, check_arrived)


def _converted(address: str, row: Published, root: Path) -> Path:
    """A copy on the hub as an npz in the cache, its JSON next to it."""
    target = _place(address, row, root)
    headless = address in row.headless
    with locked(target.with_name(f".{target.name}.lock"), f"downloads {target.name}"):
        if not target.is_file():  # else another process brought it while this one waited
            source, cached = _from_hub(address, target.with_suffix(".safetensors"), _most(row))
            try:
                params = read_safetensors(source)
                _check_tree(source, params, row, headless)
            except CheckpointError as error:
                raise Refused(f"not a copy of that file: {error}") from None
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
            _demand(target, row.demanded)
        except CheckpointError as error:
            raise Refused(str(error)) from None
    return target


def _from_hub(address: str, target: Path, most: int) -> tuple[Path, bool]:
    """A file of the Hugging Face hub, and whether it lies in the cache of the hub's own client, which is only read."""
    owner, repository, file = address.removeprefix("hf://").split("/", 2)
    if cached := _hub_cached(f"{owner}/{repository}", file):
        return cached, True
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise Refused("HF_HUB_OFFLINE is set")
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    return download(f"{endpoint.rstrip('/')}/{owner}/{repository}/resolve/main/{file}", target, most=most), False


def _hub_cached(repository: str, file: str) -> Path | None:
    """Where the hub's own client keeps a file of the newest commit that it knows; None if it has none that is whole."""
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
