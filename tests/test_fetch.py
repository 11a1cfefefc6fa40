"""Downloads: resumed, checked, limited in size, and interrupted at any moment."""

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

from .servers import CONTENT, chain, head, servers, whole

INTERRUPTED = """
import sys
from pathlib import Path
from vit_jax import cli, fetch
def main():
    fetch.download(sys.argv[1], Path(sys.argv[2]))
    return 0
cli.run(lambda: cli.call(main))
"""


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


def test_download_saves_the_bytes_as_they_were_sent(serve, tmp_path, caplog):
    server = serve(lambda server, connection, n: whole())
    with caplog.at_level(logging.WARNING, "vit_jax"):
        assert download(server.address, tmp_path / "new" / "file").read_bytes() == CONTENT
    assert f"downloading {server.address} (0.1 MB)" in caplog.text
    assert "Accept-Encoding: identity" in server.requests[0] and "Range" not in server.requests[0]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [".file.lock", "file"]
    assert read(server.address, 10**6, 5.0) == (CONTENT, "")


def test_read_has_a_limit_in_time(serve, monkeypatch):
    server = serve(lambda server, connection, n: chain(head(), server.endless(bytes(4000), 0.01)))
    with pytest.raises(Refused, match=r"not complete within 0.3 s"):
        read(server.address, 10**9, 0.3)


def test_download_is_continued_after_a_timeout(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "_TIMEOUT", (2.0, 0.2))

    def answer(server, connection, n):
        if n:
            yield from whole()
        else:
            yield head(length=len(CONTENT))
            yield CONTENT[:50_000]
            server.over.wait(5)

    assert download(serve(answer).address, tmp_path / "file").read_bytes() == CONTENT


def test_endless_body_is_refused_at_the_limit(serve, tmp_path):
    server = serve(lambda server, connection, n: chain(head(), server.endless(bytes(65536))))
    refused(server, tmp_path, "more than the expected 1,000,000 bytes")
    refused(server, tmp_path, "more than the expected 500,000 bytes", size=500_000)
    with pytest.raises(Refused, match="more than 1,000,000 bytes"):
        read(server.address, 10**6, 5.0)
    assert (tmp_path / ".file.part").stat().st_size <= 10**6


def test_endless_partial_answer_is_refused_at_the_limit(serve, tmp_path):
    """It continues a download, without a length and without an end."""

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


@pytest.mark.parametrize("status", ["206 Partial Content", "416 Range Not Satisfiable"])
def test_partial_answer_to_a_request_without_range_is_refused(serve, tmp_path, status):
    server = serve(lambda server, connection, n: [head(status, length=3), b"abc"])
    refused(server, tmp_path, f"{status}, although no range was asked for")
    assert len(server.requests) == 1


@pytest.mark.parametrize("failure", ["reset", "closed", "garbage"])
def test_connection_broken_before_the_headers_is_tried_again(serve, tmp_path, failure):
    def answer(server, connection, n):
        if n == 2:
            return whole()
        if failure == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return [b"garbage\r\n\r\n"] if failure == "garbage" else []

    server = serve(answer)
    assert download(server.address, tmp_path / "file").read_bytes() == CONTENT and len(server.requests) == 3


def test_missing_connection_is_not_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch.time, "sleep", lambda seconds: pytest.fail("a second try"))
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = f"http://127.0.0.1:{closed.getsockname()[1]}/file"
    for call in (lambda: download(address, tmp_path / "file"), lambda: read(address, 1000, 5.0)):
        with pytest.raises(Unreachable, match="Connection refused"):
            call()


def test_file_that_fails_its_check_does_not_appear(serve, tmp_path):
    def check(path):
        assert path.read_bytes() == CONTENT
        raise UserError(f"{path} is not it")

    server = serve(lambda server, connection, n: whole())
    with pytest.raises(Refused, match="not that file: it is not it"):
        download(server.address, tmp_path / "file", check=check)
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".json"] == [".file.lock"]


@pytest.mark.parametrize("right", [True, False])
def test_hash_from_the_server_is_checked(serve, tmp_path, right):
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
def test_damaged_state_of_a_part_starts_again(serve, tmp_path, state):
    server = serve(lambda server, connection, n: whole())
    (tmp_path / ".file.part").write_bytes(bytes(1000))
    (tmp_path / ".file.part.json").write_text(state.replace("ADDRESS", server.address))
    assert download(server.address, tmp_path / "file").read_bytes() == CONTENT


def test_bar_counts_megabytes_and_only_on_a_terminal(serve, tmp_path, capsys, monkeypatch):
    server = serve(lambda server, connection, n: whole())
    download(server.address, tmp_path / "quiet")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    download(server.address, tmp_path / "shown")
    assert "0.1/0.1 MB" in capsys.readouterr().err


@pytest.mark.parametrize("phase", ["headers", "body"])
def test_interrupt_ends_the_process_in_any_phase(serve, tmp_path, phase):
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
        said = process.communicate(timeout=20)[1]
    assert process.returncode == 130 and said.splitlines()[-1] == "interrupted" and "Traceback" not in said
