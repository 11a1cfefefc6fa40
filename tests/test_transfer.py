"""Transfers from servers that are broken or hostile: each ends within its limits, with an error that says why."""

import gzip

import pytest

from vit_jax import fetch, transfer
from vit_jax.fetch import Refused, Unreachable, download, read

from .servers import CONTENT, chain, head, servers, whole


@pytest.fixture
def serve(monkeypatch):
    """A function that starts a server; retries do not wait."""
    monkeypatch.setattr(fetch, "_PAUSES", (0.0, 0.0))
    with servers() as start:
        yield start


def refused(server, tmp_path, words, size=None, most=10**6):
    """Asserts that the download fails with these words, in one printable line and without a file."""
    with pytest.raises(Refused, match=words) as caught:
        download(server.address, tmp_path / "file", size=size, most=most)
    assert str(caught.value).isprintable() and not isinstance(caught.value, Unreachable)
    assert not (tmp_path / "file").exists()


@pytest.mark.parametrize("pause", [0.01, 0.4])
def test_slow_body_is_refused(serve, tmp_path, monkeypatch, pause):
    monkeypatch.setattr(transfer, "_WINDOW", 0.6)
    server = serve(lambda server, connection, n: chain(head(length=5000), server.endless(b"x", pause)))
    refused(server, tmp_path, r"too slow: \d+ bytes in \d+ s")


@pytest.mark.parametrize(
    "begin",
    [
        b"HTTP/1.1 200 OK\r\nX-Header: ",
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: /file\r\nX-Header: ",
    ],
)
def test_slow_headers_are_refused(serve, tmp_path, monkeypatch, begin):
    monkeypatch.setattr(transfer, "_HEADERS", 0.6)
    piece = begin if b"100" in begin else b"x"
    server = serve(lambda server, connection, n: chain(begin, server.endless(piece, 0.02)))
    refused(server, tmp_path, "no answer within 0.6 s")
    with pytest.raises(Refused, match=r"no answer within 0.3 s"):
        read(server.address, 1000, 0.3)


def test_endless_trailers_are_refused(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "_WINDOW", 0.6)
    trailers = b"0\r\n" + b"X-Trailer: x\r\n"
    server = serve(
        lambda server, connection, n: chain(
            head("200 OK", "Transfer-Encoding: chunked") + trailers, server.endless(b"X-Trailer: x\r\n", 0.01)
        )
    )
    refused(server, tmp_path, "too slow|header|trailer")


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
def test_impossible_length_is_refused(serve, tmp_path, length, words):
    server = serve(lambda server, connection, n: [head(length=length), CONTENT])
    refused(server, tmp_path, words)
    with pytest.raises(Refused, match="bytes"):
        read(server.address, 10**6, 5.0)


@pytest.mark.parametrize("coding", ["gzip", "br", "gzip, gzip", "\x1b[31m"])
def test_encoding_that_was_not_asked_for_is_refused(serve, tmp_path, coding):
    bomb = gzip.compress(bytes(10**7))
    server = serve(lambda server, connection, n: [head("200 OK", f"Content-Encoding: {coding}", length=len(bomb)), bomb])
    refused(server, tmp_path, "the body is encoded as .*, which was not asked for")
    with pytest.raises(Refused, match="not asked for"):
        read(server.address, 10**6, 5.0)


def test_compressed_archive_is_not_unpacked(serve, tmp_path):
    """Although its server announces the compression as an encoding of the body."""
    packed = gzip.compress(CONTENT)
    server = serve(lambda server, connection, n: [head("200 OK", "Content-Encoding: x-gzip", length=len(packed)), packed])
    assert download(f"{server.address}.tar.gz", tmp_path / "file.tar.gz").read_bytes() == packed


def test_body_of_a_redirect_is_not_read(serve, tmp_path):
    def answer(server, connection, n):
        if "GET /file" in server.requests[n]:
            yield head("302 Found", "Location: /there", "Content-Encoding: gzip")
            yield from server.endless(bytes(65536))
        else:
            yield from whole()

    server = serve(answer)
    assert download(server.address, tmp_path / "file").read_bytes() == CONTENT
    assert server.sent < 20 * 2**20


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
def test_wrong_redirect_is_refused(serve, tmp_path, place, words):
    refused(serve(lambda server, connection, n: [head("302 Found", f"Location: {place}", length=0)]), tmp_path, words)


def test_control_characters_in_an_answer_are_escaped(serve, tmp_path):
    server = serve(lambda server, connection, n: [head("404 \x1b[31mred\x9b", length=0)])
    refused(server, tmp_path, r"404 \\x1b\[31mred\\x9b")
