"""One HTTP GET whose headers and body end, whatever the server does: bounded in time, undecoded, redirects followed.

It runs in a thread of its own, and the caller takes what arrives from a queue. So the bounds and Ctrl-C hold whatever the
network or the HTTP library waits for: a name server, headers that drip, or a body without an end.
"""

import contextlib
import dataclasses
import http.client
import queue
import re
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urljoin, urlsplit

from vit_jax.errors import printable, reason, root_cause

_TIMEOUT = (10.0, 30.0)  # seconds until a connection has to be there, and then without a byte from the server
_HEADERS = 60.0  # seconds until the headers of the answer have to be there, redirects included
_RATE, _WINDOW = 1024, 60.0  # the fewest bytes per second that are accepted, over a window of so many seconds
_REDIRECTS = 10
_CHUNK = 1 << 16  # bytes


class Refused(Exception):
    """What an address answered instead of the file, as one printable line."""

    def __init__(self, words: str):
        super().__init__(printable(" ".join(words.split()), 300))


class Unreachable(Refused):
    """There was no connection to the server."""


class Broken(Exception):
    """A transfer that failed in a way that another request may mend."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a server answered, before its body."""

    status: int
    reason: str
    headers: Any  # case-insensitive
    digest: str | None  # SHA-256 of the file, which the Hugging Face hub sends with its redirect

    @property
    def words(self) -> str:
        return f"{self.status} {self.reason}".strip()


def least_bytes() -> float:
    """The bytes that have to arrive in a window of time."""
    return _RATE * _WINDOW


def content_length(answer: Answer, address: str) -> int | None:
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


@contextlib.contextmanager
def opened(address: str, headers: dict[str, str], seconds: float | None) -> Iterator[tuple[Answer, Iterator[bytes]]]:
    """The answer to a GET and the chunks of its body as they were sent, within `seconds` if given.

    Raises Refused where the server is too slow or gives no answer, Broken where another request may help.
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
            if received < least_bytes():  # not over the time that has passed: the process may have been stopped
                raise Refused(f"too slow: {received:,} bytes in {now - begin:.0f} s")
            begin, received = now, 0


def _transfer(address: str, headers: dict[str, str]) -> Iterator[Answer | bytes]:
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
                yield Answer(response.status_code, response.reason or "", response.headers, digest)
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
    """What an exception of a transfer means: Refused, Unreachable, or Broken, after which another request may help."""
    import requests
    import urllib3

    if isinstance(error, Refused):
        return error
    cause = root_cause(error)
    words = reason(cause)
    broken = (requests.ReadTimeout, urllib3.exceptions.ReadTimeoutError, urllib3.exceptions.ProtocolError)
    if isinstance(error, broken) or isinstance(cause, (ConnectionResetError, BrokenPipeError, http.client.HTTPException)):
        return Broken(printable(words))
    if isinstance(error, requests.ConnectionError) and not isinstance(error, requests.exceptions.SSLError):
        return Unreachable(words)
    return Refused(words)
