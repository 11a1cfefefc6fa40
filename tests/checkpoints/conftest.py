"""A server on loopback that fails on request, and a small published model for it to serve."""

import dataclasses
import hashlib
import http.server
import re
import socket
import threading
import time

import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

from vit_jax import fetch as fetching
from vit_jax import transfer
from vit_jax.formats.google import save_npz
from vit_jax.interop.torch_models import to_timm
from vit_jax.models.variants import build, shapes

NAME = "imagenet21k/Nano_8"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def tree():
    model = build("Nano/8", num_classes=3, num_layers=4)
    draw = np.random.default_rng(0)
    flat = flatten_dict(shapes(model, 16), sep="/")
    return unflatten_dict({name: draw.normal(size=leaf.shape).astype(np.float32) for name, leaf in flat.items()}, sep="/")


@pytest.fixture(scope="module")
def content(tree, tmp_path_factory):
    path = tmp_path_factory.mktemp("npz") / "x.npz"
    save_npz(path, tree)
    return path.read_bytes()


@pytest.fixture(scope="module")
def tensors(tree, tmp_path_factory):
    """The bytes of timm's safetensors: "whole", and "headless" without the head."""
    folder = tmp_path_factory.mktemp("safetensors")
    save_file(to_timm(tree)[0], folder / "whole")
    save_file(to_timm({name: leaf for name, leaf in tree.items() if name != "head"})[0], folder / "headless")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def isolated(tmp_path, monkeypatch):
    """Gives the test its own empty cache, no waiting between requests, and no address outside this machine."""
    monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("VIT_JAX_MIRROR", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(fetching, "_PAUSES", (0.0, 0.0))
    monkeypatch.setattr(transfer, "_TIMEOUT", (2.0, 0.2))
    monkeypatch.setattr(transfer, "_RATE", 1)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@dataclasses.dataclass
class Asked:
    method: str
    path: str
    first: int  # first byte of the requested range; 0 for the whole file
    condition: str | None
    sent: int = 0


class Server(http.server.ThreadingHTTPServer):
    """Serves files by path, and ranges of them; `mood(n, asked)` gives how the nth GET of a path fails, None: it does not."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.mood = lambda n, asked: None
        self.asked: list[Asked] = []
        self.etag = '"1"'
        self.over = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def gets(self, path=""):
        return [asked for asked in self.asked if asked.method == "GET" and path in asked.path]

    def handle_error(self, request, client_address):
        pass  # a client that left


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        server = self.server
        first = int((re.match(r"bytes=(\d+)-", self.headers.get("Range", "")) or (0, 0))[1])
        asked = Asked(self.command, self.path, first, self.headers.get("If-Range"))
        n = len(server.gets(self.path))
        server.asked.append(asked)
        mood = server.mood(n, asked) or {}
        body = mood.get("body", server.files.get(self.path))
        status = mood.get("status", 404 if body is None else 200)
        if status != 200 or body is None:
            body = mood.get("body", b"<html>an error</html>")
        elif mood.get("ranges", True) and first and asked.condition in (None, server.etag):
            if first >= len(body):
                status = 416
            else:
                status = 206
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
            body = body[first:]
        if mood.get("etag", True) and status in (200, 206):
            self.send_header("ETag", server.etag)
        if "/resolve/" in self.path and mood.get("hub", True):
            self.send_header("X-Repo-Commit", mood.get("commit", COMMIT))
            digest = f'"{hashlib.sha256(server.files.get(self.path, b"")).hexdigest()}"'
            self.send_header("X-Linked-ETag", mood.get("linked", digest))
            self.send_header("X-Linked-Size", str(len(server.files.get(self.path, b""))))
        self.send_header("Content-Length", str(mood.get("length", len(body))))
        self.end_headers()
        if self.command == "HEAD":
            return
        part = body[: mood.get("cut", len(body)) - (first if status == 206 else 0)] if "cut" in mood else body
        for at in range(0, len(part), 1 << 16):
            time.sleep(mood.get("pause", 0))
            self.wfile.write(part[at : at + (1 << 16)])
            asked.sent += len(part[at : at + (1 << 16)])
        if mood.get("stall"):
            server.over.wait(10)
        if len(part) < int(mood.get("length", len(body))):
            self.close_connection = True


@pytest.fixture
def server(content):
    server = Server()
    server.files[f"/{NAME}.npz"] = content
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.over.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def closed_address() -> str:
    """The URL of a port on loopback where no server listens."""
    return f"http://127.0.0.1:{free_port()}"


@pytest.fixture
def description():
    """The JSON next to the weights of `tiny`."""
    return {
        "normalization": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]},
        "image_size": 16,
        "class_names": ["a", "b", "c"],
        "task": "letters",
    }


@pytest.fixture
def tiny(tmp_path, description):
    """A tiny fine-tuned model as a run leaves it: final.npz and its JSON in a folder."""
    model = build("B/8", hidden_size=32, num_layers=2, num_heads=2, mlp_dim=64, num_classes=3)
    draw = np.random.default_rng(0)
    flat = flatten_dict(shapes(model, 16), sep="/")
    flat = {name: draw.normal(size=leaf.shape, scale=0.2).astype(np.float32) for name, leaf in flat.items()}
    save_npz(tmp_path / "run" / "final.npz", flat, description)
    return tmp_path / "run"
