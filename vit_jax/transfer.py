"""One HTTP GET that always ends: bounded in time, with redirects followed and the body as it was sent.

A thread does the transfer and the caller takes its results from a queue. So the bounds and Ctrl-C work whatever the network
or the HTTP library waits for: a name server, headers that arrive byte by byte, or a body without an end.
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

_TIMEOUT = (10.0, 30.0)  # seconds until there must be a connection, and then without a byte from the server
_HEADERS = 60.0  # seconds until the headers must have arrived, redirects included
_RATE, _WINDOW = 1024, 60.0  # the lowest speed in bytes per second, measured over a window in seconds
_REDIRECTS = 10
_CHUNK = 1 << 16  # bytes


class Refused(Exception):
    """The server does not give the file; the message is its answer, as one printable line."""

    def __init__(self, words: str):
        super().__init__(printable(" ".join(words.split()), 300))


class Unreachable(Refused):
    """There is no connection to the server."""


class Broken(Exception):
    """A transfer failed, and another request may succeed."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """A server's answer without its body.

    Attributes:
      status, reason: of the status line, such as 404 and "Not Found".
      headers: a mapping that ignores the case of names.
      digest: SHA-256 of the file if the Hugging Face hub sent it with a redirect, else None.
    """

    status: int
    reason: str
    headers: Any
    digest: str | None

    @property
    def status_line(self) -> str:
        """Status and reason as text."""
        return f"{self.status} {self.reason}".strip()


def min_bytes() -> float:
    """Returns the number of bytes that must arrive in every window of time."""
    return _RATE * _WINDOW


def content_length(answer: Answer, address: str) -> int | None:
    """Returns the length of the body that the headers announce, None if they announce none.

    Raises:
      Refused: if the length is not a number, or if the body is not the bytes of the file but encoded.
    """
    encoding = answer.headers.get("Content-Encoding", "identity").strip().lower()
    # Some servers announce the compression of an archive as an encoding of the body.
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
def open_url(address: str, headers: dict[str, str], seconds: float | None) -> Iterator[tuple[Answer, Iterator[bytes]]]:
    """Opens the answer to a GET and an iterator over the chunks of its body, as they were sent.

    Args:
      address: http:// or https://.
      headers: of the request.
      seconds: limit for the whole transfer; None for only those on connection, headers and speed.

    Raises:
      Refused: if the server is too slow or does not answer.
      Broken: if another request may succeed.
    """
    arrivals: queue.Queue[Any] = queue.Queue(16)
    closed = threading.Event()

    def work() -> None:
        try:
            for item in _transfer(address, headers):
                arrivals.put(item)
                if closed.is_set():
                    return
            arrivals.put(b"")
        except BaseException as error:  # raised by the caller
            arrivals.put(_failure(error))

    threading.Thread(target=work, name="download", daemon=True).start()
    end = time.monotonic() + seconds if seconds is not None else float("inf")
    try:
        answer = _next(arrivals, min(end, time.monotonic() + _HEADERS))
        if answer is None:
            raise Refused(f"no answer within {min(seconds or _HEADERS, _HEADERS):g} s")
        yield answer, _body(arrivals, end, seconds)
    finally:
        closed.set()
        with contextlib.suppress(queue.Empty):
            while True:
                arrivals.get_nowait()  # the thread may wait for space in the queue


def _next(arrivals: queue.Queue, end: float) -> Any:
    """Returns the next item, or None if there is none until the time `end`; raises an error of the thread."""
    try:
        item = arrivals.get(timeout=max(0.0, end - time.monotonic()))
    except queue.Empty:
        return None
    if isinstance(item, BaseException):
        raise item
    return item


def _body(arrivals: queue.Queue, end: float, seconds: float | None) -> Iterator[bytes]:
    """Yields the chunks of a body; raises Refused below `_RATE` bytes per second in a window, or at the time `end`."""
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
            raise Refused(f"not complete within {seconds:g} s")
        if now >= begin + _WINDOW:
            if received < min_bytes():  # not a rate over the time that has passed: the process may have been stopped
                raise Refused(f"too slow: {received:,} bytes in {now - begin:.0f} s")
            begin, received = now, 0


def _transfer(address: str, headers: dict[str, str]) -> Iterator[Answer | bytes]:
    """Yields the answer to a GET, after redirects, and then its body in chunks that are not decoded."""
    import requests

    digest, url = None, address
    headers = {"User-Agent": "vit_jax", "Accept-Encoding": "identity", **headers}
    for _ in range(_REDIRECTS):
        if urlsplit(url).scheme not in ("http", "https"):
            raise Refused(f"redirected to {url[:100]}, which is not http:// or https://")
        with requests.Session() as session:
            request = session.prepare_request(requests.Request("GET", url, headers=headers))
            settings = session.merge_environment_settings(url, {}, True, None, None)
            # Not session.send: it reads the body of a redirect without a bound, even if it does not follow the redirect.
            response = session.get_adapter(url).send(request, timeout=_TIMEOUT, **settings)
            found = re.fullmatch('"?([0-9a-f]{64})"?', response.headers.get("X-Linked-Etag", ""))
            digest = found[1] if found else digest
            if not response.is_redirect:
                yield Answer(response.status_code, response.reason or "", response.headers, digest)
                while chunk := response.raw.read1(_CHUNK, decode_content=False):
                    yield chunk
                return
            location = response.headers["Location"].encode("latin-1", "replace").decode("utf-8", "replace")
            response.close()
        try:
            url = urljoin(url, location)
        except ValueError as error:
            raise Refused(f"redirected to {location[:100]!r}: {error}") from None
    raise Refused(f"more than {_REDIRECTS} redirects")


def _failure(error: BaseException) -> BaseException:
    """Returns the meaning of a transfer's exception: Refused, Unreachable, or Broken, after which a retry may succeed."""
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
