"""Downloads from servers that are broken or hostile: each ends, within bounds of bytes and time, in a line that says why."""

import gzip
import hashlib
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from vit_jax import fetch, transfer
from vit_jax.errors import UserError
from vit_jax.fetch import Refused, Unreachable, download, read

CONTENT = bytes(range(256)) * 400


class Server:
    """Answers each connection with what the function `answer` does to its socket; `requests` are the texts it was sent."""

    def __init__(self, answer):
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self.socket.getsockname()[1]}/file"
        self.answer = answer
        self.requests: list[str] = []
        self.sent = 0
        self.over = threading.Event()
        self.threads = [threading.Thread(target=self.accept)]
        self.threads[0].start()

    def accept(self):
        while not self.over.is_set():
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            thread = threading.Thread(target=self.serve, args=(connection,))
            thread.start()
            self.threads.append(thread)

    def serve(self, connection):
        with connection:
            connection.settimeout(10)
            try:
                text = b""
                while b"\r\n\r\n" not in text:
                    if not (received := connection.recv(65536)):
                        return
                    text += received
                self.requests.append(text.decode())
                for piece in self.answer(self, connection, len(self.requests) - 1) or ():
                    connection.sendall(piece)
                    self.sent += len(piece)
            except OSError:
                pass  # the client left

    def endless(self, piece: bytes, pause: float = 0.0):
        """The piece again and again, until the test is over."""
        while not self.over.wait(pause):
            yield piece

    def close(self):
        self.over.set()
        self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
        for thread in self.threads:
            thread.join(10)


@pytest.fixture
def serve():
    servers = []

    def start(answer) -> Server:
        servers.append(Server(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(fetch, "_PAUSES", (0.0, 0.0))


def head(status="200 OK", *headers: str, length: int | str | None = None) -> bytes:
    lines = [f"HTTP/1.1 {status}", *headers, *([] if length is None else [f"Content-Length: {length}"]), "Connection: close"]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def whole(*headers: str):
    return [head("200 OK", *headers, length=len(CONTENT)), CONTENT]


def refused(server, tmp_path, words, size=None, most=10**6):
    """Asserts that the address is refused with these words, soon, without a file, and as one printable line."""
    begin = time.monotonic()
    with pytest.raises(Refused, match=words) as caught:
        download(server.address, tmp_path / "file", size=size, most=most)
    assert time.monotonic() - begin < 20  # a loaded machine is slow; a transfer without a bound would go on for ever
    assert str(caught.value).isprintable() and not isinstance(caught.value, Unreachable)
    assert not (tmp_path / "file").exists()


def test_download_brings_the_bytes_as_they_were_sent(serve, tmp_path, caplog):
    server = serve(lambda server, connection, n: whole())
    with caplog.at_level(logging.WARNING, "vit_jax"):
        assert download(server.address, tmp_path / "new" / "file").read_bytes() == CONTENT
    assert f"downloading {server.address} (0.1 MB)" in caplog.text
    assert "Accept-Encoding: identity" in server.requests[0] and "Range" not in server.requests[0]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [".file.lock", "file"]
    assert read(server.address, 10**6, 5.0) == (CONTENT, "")


# Time.


@pytest.mark.parametrize("pause", [0.01, 0.4])
def test_a_body_that_drips_ends(serve, tmp_path, monkeypatch, pause):
    monkeypatch.setattr(transfer, "_WINDOW", 0.6)
    server = serve(lambda server, connection, n: _then(head(length=5000), server.endless(b"x", pause)))
    refused(server, tmp_path, r"too slow: \d+ bytes in \d+ s")


def _then(first, rest):
    yield first
    yield from rest


@pytest.mark.parametrize(
    "begin",
    [
        b"HTTP/1.1 200 OK\r\nX-Header: ",
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: /file\r\nX-Header: ",
    ],
)
def test_headers_that_drip_end(serve, tmp_path, monkeypatch, begin):
    monkeypatch.setattr(transfer, "_HEADERS", 0.6)
    piece = begin if b"100" in begin else b"x"
    server = serve(lambda server, connection, n: _then(begin, server.endless(piece, 0.02)))
    refused(server, tmp_path, "no answer within 0.6 s")
    with pytest.raises(Refused, match=r"no answer within 0.3 s"):
        read(server.address, 1000, 0.3)


def test_trailers_without_an_end_do_not_hold_the_caller(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "_WINDOW", 0.6)
    trailers = b"0\r\n" + b"X-Trailer: x\r\n"
    server = serve(
        lambda server, connection, n: _then(
            head("200 OK", "Transfer-Encoding: chunked") + trailers, server.endless(b"X-Trailer: x\r\n", 0.01)
        )
    )
    refused(server, tmp_path, "too slow|header|trailer")


def test_read_has_a_time_for_the_whole(serve, monkeypatch):
    server = serve(lambda server, connection, n: _then(head(), server.endless(bytes(4000), 0.01)))
    begin = time.monotonic()
    with pytest.raises(Refused, match=r"not whole within 0.3 s"):
        read(server.address, 10**9, 0.3)
    assert time.monotonic() - begin < 20


def test_a_server_that_stops_in_the_middle_is_asked_again(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "_TIMEOUT", (2.0, 0.2))

    def answer(server, connection, n):
        if n:
            yield from whole()
        else:
            yield head(length=len(CONTENT))
            yield CONTENT[:50_000]
            server.over.wait(5)

    assert download(serve(answer).address, tmp_path / "file").read_bytes() == CONTENT


# Bytes.


def test_a_body_without_an_end_ends_at_the_bound(serve, tmp_path):
    server = serve(lambda server, connection, n: _then(head(), server.endless(bytes(65536))))
    refused(server, tmp_path, "more than the expected 1,000,000 bytes")
    refused(server, tmp_path, "more than the expected 500,000 bytes", size=500_000)
    with pytest.raises(Refused, match="more than 1,000,000 bytes"):
        read(server.address, 10**6, 5.0)
    assert (tmp_path / ".file.part").stat().st_size <= 10**6


@pytest.mark.parametrize(
    ("length", "words"),
    [
        (1_000_001, "1,000,001 bytes, expected at most 1,000,000"),
        ("²", r"Content-Length is '²', expected a number of bytes"),
        ("-1", "Content-Length is '-1'"),
        ("9" * 5000, "Content-Length is '9999"),
        ("1e3", "Content-Length is '1e3'"),
    ],
)
def test_an_impossible_length_is_refused(serve, tmp_path, length, words):
    server = serve(lambda server, connection, n: [head(length=length), CONTENT])
    refused(server, tmp_path, words)
    with pytest.raises(Refused, match="bytes"):
        read(server.address, 10**6, 5.0)


def test_a_partial_answer_that_overshoots_ends(serve, tmp_path):
    """It continues what a first answer began, without a length and without an end."""

    def answer(server, connection, n):
        if n == 0:
            yield head("200 OK", 'ETag: "1"', length=len(CONTENT))
            yield CONTENT[:50_000]
        else:
            first = int(server.requests[n].partition("bytes=")[2].partition("-")[0])
            yield head("206 Partial Content", f"Content-Range: bytes {first}-{len(CONTENT) - 1}/{len(CONTENT)}")
            yield from server.endless(bytes(65536))

    server = serve(answer)
    refused(server, tmp_path, f"more than the expected {len(CONTENT):,} bytes")
    assert server.sent < 20 * 2**20


@pytest.mark.parametrize("coding", ["gzip", "br", "gzip, gzip", "\x1b[31m"])
def test_an_encoding_that_was_not_asked_for_is_refused(serve, tmp_path, coding):
    bomb = gzip.compress(bytes(10**7))
    server = serve(lambda server, connection, n: [head("200 OK", f"Content-Encoding: {coding}", length=len(bomb)), bomb])
    refused(server, tmp_path, "the body is encoded as .*, which was not asked for")
    with pytest.raises(Refused, match="not asked for"):
        read(server.address, 10**6, 5.0)


def test_a_compressed_archive_is_kept_as_it_is(serve, tmp_path):
    """Although its server calls the compression a coding of the transfer."""
    packed = gzip.compress(CONTENT)
    server = serve(lambda server, connection, n: [head("200 OK", "Content-Encoding: x-gzip", length=len(packed)), packed])
    assert download(f"{server.address}.tar.gz", tmp_path / "file.tar.gz").read_bytes() == packed


def test_the_body_of_a_redirect_is_not_read(serve, tmp_path):
    def answer(server, connection, n):
        if "GET /file" in server.requests[n]:
            yield head("302 Found", "Location: /there", "Content-Encoding: gzip")
            yield from server.endless(bytes(65536))
        else:
            yield from whole()

    server = serve(answer)
    assert download(server.address, tmp_path / "file").read_bytes() == CONTENT
    assert server.sent < 20 * 2**20


# Answers.


@pytest.mark.parametrize("status", ["206 Partial Content", "416 Range Not Satisfiable"])
def test_a_partial_answer_to_a_whole_request_is_refused(serve, tmp_path, status):
    server = serve(lambda server, connection, n: [head(status, length=3), b"abc"])
    refused(server, tmp_path, f"{status}, although no range was asked for")
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("http://[::1", r"redirected to 'http://\[::1': Invalid IPv6 URL"),
        ("file:///etc/passwd", "redirected to file:///etc/passwd, which is not http:// or https://"),
        ("/file", "more than 10 redirects"),
        ("http://", "more than 10 redirects"),
        ("http://127.0.0.1:99999/", "port|URL|parse"),
        ("ftp://\x1b[0m", r"redirected to 'ftp://\\x1b"),
    ],
)
def test_a_redirect_to_nowhere_is_refused(serve, tmp_path, place, words):
    refused(serve(lambda server, connection, n: [head("302 Found", f"Location: {place}", length=0)]), tmp_path, words)


def test_control_characters_of_a_server_are_escaped(serve, tmp_path):
    server = serve(lambda server, connection, n: [head("404 \x1b[31mred\x9b", length=0)])
    refused(server, tmp_path, r"404 \\x1b\[31mred\\x9b")


@pytest.mark.parametrize("failure", ["reset", "closed", "garbage"])
def test_a_connection_that_breaks_before_the_headers_is_tried_again(serve, tmp_path, failure):
    def answer(server, connection, n):
        if n == 2:
            return whole()
        if failure == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return [b"garbage\r\n\r\n"] if failure == "garbage" else []

    server = serve(answer)
    assert download(server.address, tmp_path / "file").read_bytes() == CONTENT and len(server.requests) == 3


def test_no_connection_is_noticed_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "_PAUSES", (60.0,))
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = f"http://127.0.0.1:{closed.getsockname()[1]}/file"
    for call in (lambda: download(address, tmp_path / "file"), lambda: read(address, 1000, 5.0)):
        with pytest.raises(Unreachable, match="Connection refused"):
            call()


def test_a_checked_file_is_the_only_one_that_appears(serve, tmp_path):
    def check(path):
        assert path.read_bytes() == CONTENT
        raise UserError(f"{path} is not it")

    server = serve(lambda server, connection, n: whole())
    with pytest.raises(Refused, match="not that file: it is not it"):
        download(server.address, tmp_path / "file", check=check)
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".json"] == [".file.lock"]


@pytest.mark.parametrize("right", [True, False])
def test_a_hash_that_the_server_gives_is_checked(serve, tmp_path, right):
    digest = hashlib.sha256(CONTENT if right else b"").hexdigest()
    server = serve(
        lambda server, connection, n: (
            [head("302 Found", f'X-Linked-Etag: "{digest}"', "Location: /there", length=0)]
            if "GET /file" in server.requests[n]
            else whole()
        )
    )
    if right:
        assert download(server.address, tmp_path / "file").read_bytes() == CONTENT
    else:
        refused(server, tmp_path, f"its SHA-256 is {hashlib.sha256(CONTENT).hexdigest()}, the server says {digest}")


@pytest.mark.parametrize("state", ["[" * 10**5, '{"address": 1, "total": 5}', '{"address": "ADDRESS", "total": "x"}', "\x00"])
def test_a_damaged_note_on_a_part_starts_over(serve, tmp_path, state):
    server = serve(lambda server, connection, n: whole())
    (tmp_path / ".file.part").write_bytes(bytes(1000))
    (tmp_path / ".file.part.json").write_text(state.replace("ADDRESS", server.address))
    assert download(server.address, tmp_path / "file").read_bytes() == CONTENT


# The terminal and the process.


def test_the_bar_counts_megabytes_and_only_on_a_terminal(serve, tmp_path, capsys, monkeypatch):
    server = serve(lambda server, connection, n: whole())
    download(server.address, tmp_path / "quiet")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    download(server.address, tmp_path / "shown")
    assert "0.1/0.1 MB" in capsys.readouterr().err


INTERRUPTED = """
import sys
from pathlib import Path
from vit_jax import cli, fetch
def main():
    fetch.download(sys.argv[1], Path(sys.argv[2]))
    return 0
cli.run(lambda: cli.call(main))
"""


@pytest.mark.parametrize("phase", ["headers", "body"])
def test_an_interrupt_ends_the_process_at_any_moment(serve, tmp_path, phase):
    reached = threading.Event()

    def answer(server, connection, n):
        if phase == "body":
            yield head(length=len(CONTENT))
            yield CONTENT[:1000]
        reached.set()
        server.over.wait(20)

    server = serve(answer)
    command = [sys.executable, "-c", INTERRUPTED, server.address, str(tmp_path / "file")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert reached.wait(20)
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        begin = time.monotonic()
        said = process.communicate(timeout=20)[1]
    assert process.returncode == 130 and said.splitlines()[-1] == "interrupted" and "Traceback" not in said
    assert time.monotonic() - begin < 20
