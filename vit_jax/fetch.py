"""One HTTP download for checkpoints, data sets and images: resumable, checked, bounded in bytes and in time.

A transfer runs in a thread of its own, and the caller takes what arrives from a queue. So the bounds and Ctrl-C hold whatever
the network or the HTTP library waits for: a name server, headers that drip, or a body without an end.
"""

import contextlib
import dataclasses
import http.client
import json
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

from vit_jax.errors import UserError, printable, reason, root_cause
from vit_jax.files import locked, sha256

_log = logging.getLogger("vit_jax")

_PAUSES = (1.0, 2.0, 4.0)  # seconds before another request; one that brought a window's least starts the count again
_TIMEOUT = (10.0, 30.0)  # seconds until a connection has to be there, and then without a byte from the server
_HEADERS = 60.0  # seconds until the headers of the answer have to be there, redirects included
_RATE, _WINDOW = 1024, 60.0  # the fewest bytes per second that are accepted, over a window of so many seconds
_REDIRECTS = 10
_CHUNK = 1 << 16  # bytes
_RETRIED = (408, 429, 500, 502, 503, 504)  # statuses that may be another in a moment
MOST = 2**34  # bytes, when the caller knows no better bound


class Refused(Exception):
    """What an address answered instead of the file, as one printable line."""

    def __init__(self, words: str):
        super().__init__(printable(" ".join(words.split()), 300))


class Unreachable(Refused):
    """There was no connection to the server."""


class _Broken(Exception):
    """A transfer that failed in a way that another request may mend."""


@dataclasses.dataclass(frozen=True)
class _Answer:
    """What a server answered, before its body."""

    status: int
    reason: str
    headers: Any  # case-insensitive
    digest: str | None  # SHA-256 of the file, which the Hugging Face hub sends with its redirect

    @property
    def words(self) -> str:
        return f"{self.status} {self.reason}".strip()


def download(
    address: str,
    target: Path,
    size: int | None = None,
    most: int = MOST,
    check: Callable[[Path], None] = lambda path: None,
) -> Path:
    """Downloads `address` to `target`, which appears when it is whole and checked; one process at a time.

    What has arrived lies in a hidden file next to the target, from which a later call continues.

    Args:
      address: http:// or https://.
      target: where the file belongs. An existing file is checked and returned.
      size: of the file in bytes, if it is known.
      most: the most bytes that are accepted if the size is not known.
      check: raises a UserError if a path does not hold the wanted file.

    Raises:
      Refused: if the server does not give the file; Unreachable if there is no connection.
      OSError: if the file cannot be written.
    """
    with locked(target.with_name(f".{target.name}.lock"), f"downloads {target.name}"):
        part = target.with_name(f".{target.name}.part")
        path = target if target.is_file() else part
        if path is part:
            _receive(address, part, size, most, target.name)
        try:
            wanted = _read_state(part).get("sha256") if path is part else None
            if wanted and (found := sha256(part)) != wanted:
                raise UserError(f"its SHA-256 is {found}, the server says {wanted}")
            check(path)
        except UserError as error:
            if path is part:
                part.unlink()  # else the next try would continue from it
            raise Refused(f"not that file: {str(error).replace(str(path), 'it')}") from None
        if path is part:
            with open(part, "rb") as file:
                os.fsync(file.fileno())
            os.replace(part, target)
            _state_of(part).unlink(missing_ok=True)
    return target


def read(address: str, most: int, seconds: float) -> tuple[bytes, str]:
    """The bytes at an http(s) address and their media type, such as "image/png"; at most `most` bytes within `seconds`.

    Raises:
      Refused: if the server does not give them; Unreachable if there is no connection.
    """
    content = bytearray()
    try:
        with _opened(address, {}, seconds) as (answer, chunks):
            if answer.status != 200:
                raise Refused(answer.words)
            total = _length(answer, address)
            if total is not None and total > most:
                raise Refused(f"{total:,} bytes, at most {most:,} are read")
            for chunk in chunks:
                content += chunk
                if len(content) > most:
                    raise Refused(f"more than {most:,} bytes")
    except _Broken as error:
        raise Refused(str(error)) from None
    if total is not None and len(content) != total:
        raise Refused(f"{len(content):,} of {total:,} bytes")
    return bytes(content), answer.headers.get("Content-Type", "").partition(";")[0].strip().lower()


def _receive(address: str, part: Path, size: int | None, most: int, title: str) -> None:
    """Brings a file to `part`, continuing what an earlier try left, with further requests while they bring something."""
    state = _read_state(part)
    if state.get("address") != address or _size_of(part) > (state["total"] or 0):
        part.unlink(missing_ok=True)
    best, tries = 0, 0
    while True:
        try:
            _request(address, part, size, most, title)
            return
        except _Broken as error:
            there = _size_of(part)
            if there - best >= _RATE * _WINDOW:
                best, tries = there, 0
            if tries == len(_PAUSES):
                raise Refused(str(error)) from None
            _log.info("%s: %s after %d bytes; trying again in %g s", printable(address), error, there, _PAUSES[tries])
            time.sleep(_PAUSES[tries])
            tries += 1


def _request(address: str, part: Path, size: int | None, most: int, title: str) -> None:
    """One request, for what is missing of `part`."""
    there, state = _size_of(part), _read_state(part)
    if there and there == state["total"]:
        return  # an earlier process ended between the last byte and the rename
    headers = {}
    if there and state["validator"] and state["total"]:
        headers = {"Range": f"bytes={there}-", "If-Range": state["validator"]}
    with _opened(address, headers, None) as (answer, chunks):
        if not (headers and answer.status == 206):
            if answer.status != 200:
                _refuse(answer, part, bool(headers))
            there = 0
        total = _length(answer, address)
        if there:
            _check_range(answer, part, there, state["total"])
            total = state["total"]
        if total is not None and (total != size if size is not None else total > most):
            raise Refused(f"{total:,} bytes, expected {f'{size:,}' if size is not None else f'at most {most:,}'}")
        if not there:
            _start(address, part, answer, total)
        bound = total if total is not None else size if size is not None else most
        megabytes = f"{total / 1e6:.1f} MB" if total is not None else "of unknown size"
        _log.warning("downloading %s (%s%s)", printable(address), f"{there / 1e6:.1f} of " if there else "", megabytes)
        with open(part, "ab" if there else "wb") as file, _bar(title, total, there) as bar:
            for chunk in chunks:
                there += len(chunk)
                if there > bound:
                    raise Refused(f"more than the expected {bound:,} bytes")
                file.write(chunk)
                bar.update(len(chunk) / 1e6)
    if total is not None and there != total:
        raise _Broken(f"{there:,} of {total:,} bytes")


def _refuse(answer: _Answer, part: Path, ranged: bool) -> None:
    """Raises what an answer without the file means."""
    if answer.status == 416 and ranged:
        part.unlink()
        raise _Broken(answer.words)
    if answer.status in (206, 416):
        raise Refused(f"{answer.words}, although no range was asked for")
    if answer.status in _RETRIED:
        raise _Broken(answer.words)
    raise Refused(answer.words)


def _check_range(answer: _Answer, part: Path, there: int, total: int) -> None:
    """Raises _Broken, and drops the part, unless the answer continues it."""
    found = re.fullmatch(r"bytes ([0-9]{1,15})-([0-9]{1,15})/([0-9]{1,15})", answer.headers.get("Content-Range", ""))
    if not found or int(found[1]) != there or int(found[3]) != total:
        part.unlink()
        raise _Broken(f"{answer.words} with another range than asked for")


def _start(address: str, part: Path, answer: _Answer, total: int | None) -> None:
    """Begins a part anew and notes where it comes from, and by what its server knows that the file is still the same."""
    part.unlink(missing_ok=True)  # before the state changes: old bytes never lie under a new validator
    etag = answer.headers.get("ETag", "")
    validator = etag if etag.startswith('"') else answer.headers.get("Last-Modified")
    state = {"address": address, "validator": validator, "total": total, "sha256": answer.digest}
    _state_of(part).write_text(json.dumps(state))


def _state_of(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _read_state(part: Path) -> dict[str, Any]:
    """What `_start` noted; without an address if there is no such file or it is damaged."""
    try:
        state = json.loads(_state_of(part).read_text())
        total = state["total"]
        if isinstance(state["address"], str) and (total is None or (type(total) is int and total > 0)):
            return {"validator": None, "sha256": None} | state
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        pass
    return {"total": None}


def _size_of(part: Path) -> int:
    return part.stat().st_size if part.is_file() else 0


def _length(answer: _Answer, address: str) -> int | None:
    """The length of the body that the headers announce, None if they do not; the body is the file's own bytes."""
    encoding = answer.headers.get("Content-Encoding", "identity").strip().lower()
    # Some servers call the compression of an archive a coding of the transfer.
    archive = urlsplit(address).path.endswith((".gz", ".tgz"))
    if encoding not in ("", "identity", *(("gzip", "x-gzip") if archive else ())):
        raise Refused(f"the body is encoded as {encoding!r}, which was not asked for")
    text = answer.headers.get("Content-Length")
    if text is None or answer.headers.get("Transfer-Encoding"):
        return None
    if not re.fullmatch("[0-9]{1,15}", text):
        raise Refused(f"Content-Length is {text[:40]!r}, expected a number of bytes")
    return int(text)


def _bar(title: str, total: int | None, there: int) -> Any:
    """A progress bar in MB; none if standard error is no terminal."""
    from tqdm import tqdm

    whole = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total:.1f} MB [{elapsed}<{remaining}, {rate_fmt}]"
    shape = whole if total else "{desc}: {n:.1f} MB [{elapsed}, {rate_fmt}]"
    return tqdm(
        total=total and total / 1e6, initial=there / 1e6, desc=printable(title), unit="MB", bar_format=shape, disable=None
    )


@contextlib.contextmanager
def _opened(address: str, headers: dict[str, str], seconds: float | None) -> Iterator[tuple[_Answer, Iterator[bytes]]]:
    """The answer to a GET and the chunks of its body as they were sent, within `seconds` if given.

    Raises Refused where the server is too slow or gives no answer, _Broken where another request may help.
    """
    arrivals: queue.Queue[Any] = queue.Queue(16)
    left = threading.Event()

    def work() -> None:
        try:
            for item in _transfer(address, headers):
                arrivals.put(item)
                if left.is_set():
                    return
            arrivals.put(b"")
        except BaseException as error:  # the caller raises it
            arrivals.put(_failure(error))

    threading.Thread(target=work, name="download", daemon=True).start()
    end = time.monotonic() + seconds if seconds is not None else float("inf")
    try:
        answer = _next(arrivals, min(end, time.monotonic() + _HEADERS))
        if answer is None:
            raise Refused(f"no answer within {min(seconds or _HEADERS, _HEADERS):g} s")
        yield answer, _body(arrivals, end, seconds)
    finally:
        left.set()
        with contextlib.suppress(queue.Empty):
            while True:
                arrivals.get_nowait()  # the thread may wait for room


def _next(arrivals: queue.Queue, end: float) -> Any:
    """What arrives next, None if nothing does until `end`; what the thread raised is raised."""
    try:
        item = arrivals.get(timeout=max(0.0, end - time.monotonic()))
    except queue.Empty:
        return None
    if isinstance(item, BaseException):
        raise item
    return item


def _body(arrivals: queue.Queue, end: float, seconds: float | None) -> Iterator[bytes]:
    """The chunks of a body, at `_RATE` bytes per second or more in every window."""
    begin, received = time.monotonic(), 0
    while True:
        chunk = _next(arrivals, min(end, begin + _WINDOW))
        if chunk:
            received += len(chunk)
            yield chunk
        elif chunk is not None:
            return
        now = time.monotonic()
        if now >= end:
            raise Refused(f"not whole within {seconds:g} s")
        if now >= begin + _WINDOW:
            if received < _RATE * _WINDOW:  # not over the time that has passed: the process may have been stopped
                raise Refused(f"too slow: {received:,} bytes in {now - begin:.0f} s")
            begin, received = now, 0


def _transfer(address: str, headers: dict[str, str]) -> Iterator[_Answer | bytes]:
    """The answer to a GET, redirects followed, then its body in chunks that nothing has decoded."""
    import requests

    digest, url = None, address
    headers = {"User-Agent": "vit_jax", "Accept-Encoding": "identity", **headers}
    for _ in range(_REDIRECTS):
        if urlsplit(url).scheme not in ("http", "https"):
            raise Refused(f"redirected to {url[:100]}, which is not http:// or https://")
        with requests.Session() as session:
            request = session.prepare_request(requests.Request("GET", url, headers=headers))
            settings = session.merge_environment_settings(url, {}, True, None, None)
            # Not session.send: it reads the body of a redirect without a bound, even if it is not to follow it.
            response = session.get_adapter(url).send(request, timeout=_TIMEOUT, **settings)
            found = re.fullmatch('"?([0-9a-f]{64})"?', response.headers.get("X-Linked-Etag", ""))
            digest = found[1] if found else digest
            if not response.is_redirect:
                yield _Answer(response.status_code, response.reason or "", response.headers, digest)
                while chunk := response.raw.read1(_CHUNK, decode_content=False):
                    yield chunk
                return
            place = response.headers["Location"].encode("latin-1", "replace").decode("utf-8", "replace")
            response.close()
        try:
            url = urljoin(url, place)
        except ValueError as error:
            raise Refused(f"redirected to {place[:100]!r}: {error}") from None
    raise Refused(f"more than {_REDIRECTS} redirects")


def _failure(error: BaseException) -> BaseException:
    """What an exception of a transfer means: Refused, Unreachable, or _Broken, after which another request may help."""
    import requests
    import urllib3

    if isinstance(error, Refused):
        return error
    cause = root_cause(error)
    words = reason(cause)
    broken = (requests.ReadTimeout, urllib3.exceptions.ReadTimeoutError, urllib3.exceptions.ProtocolError)
    if isinstance(error, broken) or isinstance(cause, (ConnectionResetError, BrokenPipeError, http.client.HTTPException)):
        return _Broken(printable(words))
    if isinstance(error, requests.ConnectionError) and not isinstance(error, requests.exceptions.SSLError):
        return Unreachable(words)
    return Refused(words)
