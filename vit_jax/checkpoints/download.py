"""Published files, brought here on first use and found again after that.

The cache ($VIT_JAX_CACHE, else the user's cache folder) is laid out as Google's bucket is; what was converted from a copy on
the Hugging Face hub lies apart, in `copies`, for it may lack the head. A file appears in the cache when it is whole and
checked, by a rename. Until then it grows in a hidden file beside its place, from which a later try goes on.
"""

import contextlib
import errno
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from vit_jax.checkpoints import catalogue
from vit_jax.checkpoints.catalogue import BUCKET, PUBLISHED, Published, resolve
from vit_jax.checkpoints.google import check_sums, read_meta, read_shapes, save_npz
from vit_jax.checkpoints.torch_files import read_safetensors
from vit_jax.errors import CheckpointError
from vit_jax.files import cache_root, locked, sha256
from vit_jax.models.variants import build, from_tree, patches

_log = logging.getLogger("vit_jax")

_PAUSES = (1.0, 2.0, 4.0)  # seconds before another try of an address; one that brought something starts the count again
_TIMEOUT = (10.0, 30.0)  # seconds until a server has to answer, and then without a byte from it
_CHUNK = 1 << 16  # bytes
_AGAIN = (408, 429, 500, 502, 503, 504)  # answers that may be another in a moment


class _Refused(Exception):
    """What an address answered instead of the file."""


def find(source: str | os.PathLike, complete: bool = False) -> Path:
    """The file that `source` stands for: an existing file or folder, else a published name, whose file is fetched.

    A folder stands for the weights in it: a run's `final.npz`, before there is one its `best.npz`, an exported folder's
    `model.safetensors`. For `complete` see `fetch`. CheckpointError for a folder without weights, for a name that means
    nothing, and for a file that cannot be had.
    """
    source = os.fspath(source)
    try:
        path = Path(source).expanduser()
    except RuntimeError as error:  # ~ of nobody
        raise CheckpointError(f"{source} cannot be read ({error})") from None
    try:
        if path.is_file():
            return path
        folder = path.is_dir()
    except OSError:  # a name too long to be one
        folder = False
    if folder:
        for name in ("final.npz", "best.npz", "model.safetensors"):
            if (path / name).is_file():
                return path / name
    try:
        row = resolve(source)
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
                    _check_tree(path, read_shapes(path), row, address in row.headless)
                else:
                    _check(path, row)
            except CheckpointError as error:
                raise CheckpointError(f"{error}; remove that file from the cache, and it is fetched again") from None
            return path

    def take(address: str) -> Path:
        if complete and address in row.headless:
            raise _Refused("a copy without the head, which was asked for: give num_classes (0 for features) to do without")
        if address.startswith("hf://"):
            return _converted(address, row, root)
        return _download(address, _place(address, row, root), lambda path: _check(path, row), row.size)

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

    return _first(_addresses(name, (f"{BUCKET}/{name}",)), lambda address: _download(address, path, check), name, "")


def best(name: str, ds: str = "i21k", index: str | os.PathLike | None = None) -> Published:
    """`catalogue.best`, its index fetched where none is given."""
    return catalogue.best(index or fetch_index(), name, ds)


def _addresses(name: str, addresses: tuple[str, ...]) -> tuple[str, ...]:
    """The addresses to try in their order, the user's mirror first."""
    mirror = os.environ.get("VIT_JAX_MIRROR")
    if not mirror or addresses[0].startswith("file:"):  # what lies inside the package, no mirror has
        return addresses
    root = mirror if "://" in mirror else Path(mirror).expanduser().absolute().as_uri()
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
    for address in addresses:
        try:
            return take(address)
        except _Refused as error:
            answers.append(f"{address}: {error}")
            _log.info("%s", answers[-1])
        except OSError as error:  # the disk's; what a server does is a refusal
            raise CheckpointError(
                f"{name} cannot be kept on this machine ({error}); make room, or set VIT_JAX_CACHE (and HF_HOME, where the "
                "hub's client keeps its files) to another folder"
            ) from error
    advice = ""
    if any(address.startswith(BUCKET) for address in addresses):
        advice = f"get it in another way, such as `gcloud storage cp gs://vit_models/{name} .` with a Google account, and give "
        advice += "its path, or set VIT_JAX_MIRROR to a folder or server laid out as gs://vit_models is"
    raise CheckpointError("; ".join([f"{name} cannot be had ({'; '.join(answers)}){besides}", *([advice] if advice else [])]))


def _check(path: Path, row: Published) -> None:
    """CheckpointError unless the npz is the row's: size and hash where they are known, and what the headers tell."""
    if row.size and (size := path.stat().st_size) != row.size:
        raise CheckpointError(f"{path} has {size} bytes, {row.name} has {row.size}")
    if row.sha256 and (found := sha256(path)) != row.sha256:
        raise CheckpointError(f"{path} has the SHA-256 {found}, {row.name} has {row.sha256}")
    _check_tree(path, read_shapes(path), row)


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


def _locked(target: Path) -> contextlib.AbstractContextManager[None]:
    return locked(target.with_name(f".{target.name}.lock"), f"fetches {target.name}")


def _download(address: str, target: Path, check: Callable[[Path], None], size: int | None = None) -> Path:
    """The file at an address, a local one where it lies, any other as `target`; checked, and on arrival read through."""
    if address.startswith("file:"):
        path = _local_path(address)
        if not path.is_file():
            raise _Refused("there is no such file")
        try:
            check(path)
        except CheckpointError as error:
            raise _Refused(f"not that file: {error}") from None
        return path
    if not address.startswith(("http://", "https://")):
        raise _Refused("not an address of a kind known here: a path, file://, http:// or https://")
    with _locked(target):
        if target.is_file():  # by the process that had the lock before
            return target
        part = target.with_name(f".{target.name}.part")
        _receive(address, part, size, target.name)
        try:
            check(part)
            if target.suffix == ".npz":
                check_sums(part)
        except CheckpointError as error:
            part.unlink()  # or the next try would go on from it
            raise _Refused(f"not that file: {str(error).replace(str(part), 'it')}") from None
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, target)
        _state(part).unlink(missing_ok=True)
    return target


def _state(part: Path) -> Path:
    """Where a part came from: an address, and by what its server knows that the file is still the same."""
    return part.with_name(f"{part.name}.json")


def _receive(address: str, part: Path, size: int | None, title: str) -> None:
    """Brings a file to `part`, on from where an earlier try ended, again and again while that leads on."""
    import requests

    try:
        state = json.loads(_state(part).read_text())
        usable = state["address"] == address and {"validator", "total"} <= state.keys()
    except (OSError, ValueError, LookupError, TypeError):
        usable = False
    if not usable:
        part.unlink(missing_ok=True)
    most, tries = 0, 0
    while True:
        try:
            _request(address, part, size, title)
            return
        except requests.RequestException as error:
            answer = _words(error)
        there = part.stat().st_size if part.is_file() else 0
        if there > most:
            most, tries = there, 0
        if tries == len(_PAUSES):
            raise _Refused(answer)
        _log.info("%s: %s after %d bytes; trying again in %g s", address, answer, there, _PAUSES[tries])
        time.sleep(_PAUSES[tries])
        tries += 1


def _request(address: str, part: Path, size: int | None, title: str) -> None:
    """One request, for what is missing of `part`. A RequestException is worth another one, _Refused is not."""
    import requests
    from tqdm import tqdm

    headers = {"Accept-Encoding": "identity"}
    there = part.stat().st_size if part.is_file() else 0
    state = json.loads(_state(part).read_text()) if there else {}
    if there and there == state["total"]:
        return  # all of it came, and this process's predecessor ended before it was put in place
    if there and state["validator"]:
        headers |= {"Range": f"bytes={there}-", "If-Range": state["validator"]}
    try:
        answer = requests.get(address, headers=headers, stream=True, timeout=_TIMEOUT)
    except requests.ConnectionError as error:
        if there:
            raise
        raise _Refused(_words(error)) from None  # being offline has to be noticed at once
    with answer as response:
        status = f"{response.status_code} {response.reason}".strip()
        length = response.headers.get("Content-Length", "")
        total = int(length) if length.isdigit() and not response.headers.get("Content-Encoding") else None
        if response.status_code == 206:
            span, _, whole = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
            if not span.startswith(f"{there}-") or whole != str(state.get("total")):
                part.unlink()
                raise requests.RequestException(f"{status} with another range than asked for")
            total = int(whole)
        elif response.status_code == 416:
            part.unlink()
            raise requests.RequestException(status)
        elif response.status_code in _AGAIN:
            raise requests.HTTPError(status)
        elif response.status_code != 200:
            raise _Refused(status)
        else:  # the whole file, whatever was asked for
            there = 0
        if size is not None and total is not None and total != size:
            raise _Refused(f"{total} bytes, expected {size}")
        mib = f"{total / 2**20:.0f} MiB" if total else "of unknown size"
        _log.warning("fetching %s (%s%s)", address, f"on from {there / 2**20:.0f} of " if there else "", mib)
        if not there:
            part.unlink(missing_ok=True)  # before the state changes: old bytes never stand under a new validator
            etag = response.headers.get("ETag", "")
            validator = etag if etag.startswith('"') else response.headers.get("Last-Modified")
            _state(part).write_text(json.dumps({"address": address, "validator": validator, "total": total}))
        with (
            open(part, "ab" if there else "wb") as file,
            # No bar where nobody watches.
            tqdm(total=total, initial=there, desc=title, unit="B", unit_scale=True, unit_divisor=1024, disable=None) as bar,
        ):
            for chunk in response.iter_content(_CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
        if total is not None and part.stat().st_size != total:
            raise requests.ConnectionError(f"{part.stat().st_size} of {total} bytes")


def _words(error: BaseException) -> str:
    """The innermost reason of a library's exception, in one line."""
    for _ in range(20):
        response = getattr(error, "response", None)
        if status := getattr(response, "status_code", None):
            return f"{status} {getattr(response, 'reason_phrase', '')}".strip()
        inner = error.__cause__ or error.__context__ or next((a for a in error.args if isinstance(a, Exception)), None)
        if inner is None:
            break
        error = inner
    return " ".join((getattr(error, "strerror", None) or str(error)).split())[:200] or type(error).__name__


def _converted(address: str, row: Published, root: Path) -> Path:
    """A copy on the hub as an npz in the cache, its JSON beside it."""
    target = _place(address, row, root)
    headless = address in row.headless
    with _locked(target):
        if target.is_file():  # by the process that had the lock before
            return target
        source = _from_hub(address)
        digest = sha256(source)
        # The hub's client names a large file by its SHA-256 but does not look whether it has it; safetensors has no checksums.
        blob = source.resolve()
        if re.fullmatch("[0-9a-f]{64}", blob.name) and blob.name != digest:
            blob.unlink()
            source.unlink(missing_ok=True)
            raise _Refused(f"damaged on its way: its SHA-256 is {digest}, expected {blob.name}")
        try:
            params = read_safetensors(source)
            _check_tree(source, params, row, headless)
        except CheckpointError as error:
            raise _Refused(f"not a copy of that file: {error}") from None
        meta = {
            "image_size": row.image_size,
            "source": address,
            "source_sha256": digest,
            "copy_of": row.name,
            "lacks": [name for name in ("head", "pre_logits") if headless and name not in params],
        }
        save_npz(target, params, meta)
    return target


def _from_hub(address: str) -> Path:
    """A file of the Hugging Face hub, by its own client and in its own cache."""
    import huggingface_hub as hub
    from tqdm import tqdm

    owner, repository, file = address.removeprefix("hf://").split("/", 2)
    name = f"{owner}/{repository}"
    # The client reads HF_ENDPOINT when it is imported, which may be long ago.
    endpoint = os.environ.get("HF_ENDPOINT") or None
    if isinstance(cached := hub.try_to_load_from_cache(name, file), str):
        return Path(cached)

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)  # the client's own
            super().__init__(*args, **kwargs | {"disable": not sys.stderr.isatty()})

    try:
        # Asked first, because hf_hub_download takes half a minute to believe that the hub is out of reach.
        hub.get_hf_file_metadata(hub.hf_hub_url(name, file, endpoint=endpoint), endpoint=endpoint)
        _log.warning("fetching %s", address)
        return Path(hub.hf_hub_download(name, file, endpoint=endpoint, library_name="vit_jax", tqdm_class=Bar))
    except Exception as error:  # the client raises its own, its HTTP library's and the system's
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        raise _Refused(_words(error)) from None
