"""A server for tests of downloads, whose answers are the bytes that a test gives it."""

import contextlib
import socket
import threading
from collections.abc import Iterator

CONTENT = bytes(range(256)) * 400


class Server:
    """Answers every connection with the pieces of bytes that `answer(server, connection, number of the request)` returns.

    Attributes:
      address: of the file.
      requests: the texts of the requests.
      sent: number of bytes that were sent.
      over: set when the test is over.
    """

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


@contextlib.contextmanager
def servers() -> Iterator:
    """A function that starts servers, which are closed at the end of the block."""
    started = []

    def start(answer) -> Server:
        started.append(Server(answer))
        return started[-1]

    try:
        yield start
    finally:
        for server in started:
            server.close()


def head(status="200 OK", *headers: str, length: int | str | None = None) -> bytes:
    lines = [f"HTTP/1.1 {status}", *headers, *([] if length is None else [f"Content-Length: {length}"]), "Connection: close"]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def whole(*headers: str):
    return [head("200 OK", *headers, length=len(CONTENT)), CONTENT]


def chain(first: bytes, rest):
    """A piece, and then further pieces."""
    yield first
    yield from rest
