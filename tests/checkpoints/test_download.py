"""Downloads against a real server on loopback: what is cut goes on, what is refused is asked for elsewhere, and what cannot be
had is told with every answer."""

import contextlib
import dataclasses
import errno
import hashlib
import http.server
import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

from vit_jax import fetch as fetching
from vit_jax import files, transfer
from vit_jax.checkpoints import catalogue, download
from vit_jax.checkpoints.catalogue import PUBLISHED, Published
from vit_jax.checkpoints.download import best, fetch, find, local
from vit_jax.errors import CheckpointError
from vit_jax.formats.google import read_meta, read_npz, save_npz
from vit_jax.interop.torch_models import to_huggingface, to_timm
from vit_jax.models.variants import build, shapes

NAME = "imagenet21k/Nano_8"
REPOSITORY = "timm/nano_patch8_16.orig"
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
    """As timm keeps it, and without the head."""
    folder = tmp_path_factory.mktemp("safetensors")
    save_file(to_timm(tree)[0], folder / "whole")
    save_file(to_timm({name: leaf for name, leaf in tree.items() if name != "head"})[0], folder / "headless")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """A cache of its own for every test, no waiting, and nothing that leads out of this machine."""
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
    first: int  # byte of the range asked for; 0 for all
    condition: str | None
    sent: int = 0


class Server(http.server.ThreadingHTTPServer):
    """Files by path, ranges of them on request; `mood(n, asked)` says how the nth GET of a path fares, None: well."""

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


def row(*addresses: str, **fields) -> Published:
    return Published(NAME, "Nano/8", 16, 3, addresses, **{"mib": 3.1, **fields})


def sha256(path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def kept(tmp_path) -> set[str]:
    return {str(path.relative_to(tmp_path / "cache")) for path in (tmp_path / "cache").rglob("*") if path.is_file()}


def test_a_file_is_fetched_once(server, content, tmp_path, caplog):
    wanted = row(f"{server.url}/{NAME}.npz", size=len(content), sha256=hashlib.sha256(content).hexdigest())
    assert local(wanted) is None
    with caplog.at_level(logging.WARNING, "vit_jax"):
        path = fetch(wanted)
    assert path == tmp_path / "cache" / f"{NAME}.npz" and path.read_bytes() == content
    assert f"downloading {server.url}/{NAME}.npz ({len(content) / 1e6:.1f} MB)" in caplog.text
    assert fetch(wanted) == local(wanted) == path and len(server.asked) == 1
    assert kept(tmp_path) == {f"{NAME}.npz", "imagenet21k/.Nano_8.npz.lock"}
    assert fetch(wanted, cache=tmp_path / "another") == tmp_path / "another" / f"{NAME}.npz"


def test_where_the_cache_is(monkeypatch, tmp_path):
    assert files.cache_root() == tmp_path / "cache"
    monkeypatch.delenv("VIT_JAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert files.cache_root() == tmp_path / "xdg" / "vit_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert files.cache_root() == Path.home() / ".cache" / "vit_jax"


@pytest.mark.parametrize("seed", range(3))
def test_cut_at_ten_places_it_goes_on_from_each(server, content, seed):
    places = sorted(np.random.default_rng(seed).integers(1, len(content), size=10).tolist())
    server.mood = lambda n, asked: {"cut": places[n]} if n < 10 else None
    path = fetch(row(f"{server.url}/{NAME}.npz"))
    assert sha256(path) == hashlib.sha256(content).hexdigest()
    gets = server.gets()
    assert len(gets) == 11 and gets[0].first == 0
    for asked, place in zip(gets[1:], places, strict=True):  # on from what had come, never from the beginning
        assert place - transfer._CHUNK <= asked.first <= place
        assert asked.first == 0 or asked.condition == '"1"'


def test_another_process_goes_on_where_one_ended(server, content, monkeypatch):
    monkeypatch.setattr(fetching, "_PAUSES", ())
    server.mood = lambda n, asked: {"cut": 2_000_000} if n == 0 else None
    wanted = row(f"{server.url}/{NAME}.npz")
    with pytest.raises(CheckpointError, match=r"could not be downloaded: .*tried: http://[^ ]*: .*(2,000,000|IncompleteRead)"):
        fetch(wanted)
    assert local(wanted) is None
    assert fetch(wanted).read_bytes() == content
    again = server.gets()[1]
    assert 2_000_000 - transfer._CHUNK <= again.first <= 2_000_000 and again.sent == len(content) - again.first


def test_a_file_that_changed_meanwhile_is_not_spliced(server, content, monkeypatch):
    monkeypatch.setattr(fetching, "_PAUSES", ())
    server.mood = lambda n, asked: {"cut": 2_000_000, "body": bytes(len(content))} if n == 0 else None
    wanted = row(f"{server.url}/{NAME}.npz")
    with pytest.raises(CheckpointError):
        fetch(wanted)
    server.etag = '"2"'
    assert fetch(wanted).read_bytes() == content
    assert server.gets()[1].condition == '"1"' and server.gets()[1].sent == len(content)


@pytest.mark.parametrize("missing", ["ranges", "etag"])
def test_a_server_that_cannot_go_on_starts_again(server, content, missing):
    server.mood = lambda n, asked: {missing: False} | ({"cut": 1_000_000 * (n + 1)} if n < 2 else {})
    assert fetch(row(f"{server.url}/{NAME}.npz")).read_bytes() == content
    assert [asked.first > 0 for asked in server.gets()] == [False] + 2 * [missing == "ranges"]


def test_what_another_address_left_is_not_gone_on_with(server, content, monkeypatch):
    monkeypatch.setattr(fetching, "_PAUSES", ())
    server.mood = lambda n, asked: {"cut": 2_000_000, "body": bytes(len(content))} if "bad" in asked.path else None
    assert fetch(row(f"{server.url}/bad.npz", f"{server.url}/{NAME}.npz")).read_bytes() == content
    assert [asked.first for asked in server.gets()] == [0, 0]


@pytest.mark.parametrize("state", ["", "[]", "{}", '{"address": "http://127.0.0.1/another"}', None])
def test_a_part_of_unknown_origin_is_not_gone_on_with(server, content, tmp_path, state):
    part = tmp_path / "cache" / "imagenet21k" / ".Nano_8.npz.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(bytes(1000))
    if state is not None:
        part.with_name(f"{part.name}.json").write_text(state)
    assert fetch(row(f"{server.url}/{NAME}.npz")).read_bytes() == content and server.gets()[0].first == 0


def test_a_process_that_ended_before_the_rename(server, content, tmp_path):
    url = f"{server.url}/{NAME}.npz"
    part = tmp_path / "cache" / "imagenet21k" / ".Nano_8.npz.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(content)
    part.with_name(f"{part.name}.json").write_text(json.dumps({"address": url, "validator": '"1"', "total": len(content)}))
    assert fetch(row(url)).read_bytes() == content and not server.asked


@pytest.mark.parametrize("status", [503, 429])
def test_a_server_that_is_busy_is_asked_again(server, content, status):
    server.mood = lambda n, asked: {"status": status} if n < 2 else None
    assert fetch(row(f"{server.url}/{NAME}.npz")).read_bytes() == content


def test_being_offline_is_noticed_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr(fetching, "_PAUSES", (60.0, 60.0))
    closed = f"127.0.0.1:{free_port()}"
    with pytest.raises(CheckpointError, match="^no network: Nano_8 could not be .*: .*(Connection refused.*){2}"):
        fetch(row(f"http://{closed}/{NAME}.npz", f"hf://{REPOSITORY}/model.safetensors"))


def flipped(content: bytes) -> bytes:
    place = len(content) // 2  # within the values of an array
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def another_model(tmp_path, **fields) -> bytes:
    flat = flatten_dict(shapes(build("Nano/8", **{"num_classes": 3, **fields}), fields.get("image_size", 16)), sep="/")
    np.savez(tmp_path / "another.npz", **{name: np.zeros(leaf.shape, np.float32) for name, leaf in flat.items()})
    return (tmp_path / "another.npz").read_bytes()


# How a server fails → the mood that makes it, and what is said of it.
FAILURES = {
    "403": (lambda content, tmp_path: {"status": 403}, "403 Forbidden"),
    "404": (lambda content, tmp_path: {"status": 404}, "404 Not Found"),
    "500": (lambda content, tmp_path: {"status": 500}, "500 Internal Server Error"),
    "refuses": (None, "Connection refused"),
    "stalls": (lambda content, tmp_path: {"body": content, "cut": 100_000, "stall": True}, "timed out"),
    "stalls at once": (lambda content, tmp_path: {"body": content, "cut": 0, "stall": True}, "timed out"),
    "too short": (lambda content, tmp_path: {"body": content[:-9]}, "bytes, expected"),
    "shorter than it says": (lambda content, tmp_path: {"body": content[:-9], "length": len(content)}, "IncompleteRead|bytes"),
    "wrong bytes": (lambda content, tmp_path: {"body": flipped(content)}, "not that file: .*(SHA-256|damaged)"),
    "a page": (
        lambda content, tmp_path: {"body": b"<html>log in, please</html>"},
        "not that file: it is no npz|bytes, expected",
    ),
    "nothing": (lambda content, tmp_path: {"body": b""}, "not that file: it is empty|0 bytes, expected"),
    "another head": (
        lambda content, tmp_path: {"body": another_model(tmp_path, num_classes=4)},
        "not that file: it has a head of 4 classes, that of .* has 3|bytes, expected",
    ),
    "another depth": (
        lambda content, tmp_path: {"body": another_model(tmp_path, num_layers=2)},
        "not that file: it is not the Nano/8 of .*: num_layers is 2, expected 4|bytes, expected",
    ),
}


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("failure", FAILURES)
def test_the_next_address_is_tried_and_failing_all_each_answer_told(server, content, tmp_path, failure, exact):
    """`exact`: size and hash are known. Where they are not, the arrays and their checksums have to tell."""
    make, said = FAILURES[failure]
    if failure == "too short" and not exact:
        said = "not that file: it is no npz, or is cut short"
    mood = make(content, tmp_path) if make else {}
    bad = f"{server.url if make else f'http://127.0.0.1:{free_port()}'}/bad.npz"
    server.mood = lambda n, asked: mood if "bad" in asked.path else None
    known = dict(size=len(content), sha256=hashlib.sha256(content).hexdigest()) if exact else {}
    with pytest.raises(CheckpointError, match=f"Nano_8 could not be downloaded: .*tried: {bad}: .*({said})") as error:
        fetch(row(bad, **known))
    assert "\n" not in str(error.value)
    assert not any(name.endswith(".npz") for name in kept(tmp_path))
    assert fetch(row(bad, f"{server.url}/{NAME}.npz", **known)).read_bytes() == content


def test_all_answers_are_told_with_what_to_do(server, tmp_path, monkeypatch):
    server.mood = lambda n, asked: {"status": 403} if "bucket" in asked.path else None
    monkeypatch.setattr(download, "BUCKET", f"{server.url}/bucket")
    monkeypatch.setenv("VIT_JAX_MIRROR", str(tmp_path / "mirror"))
    with pytest.raises(CheckpointError) as error:
        fetch(row(f"{server.url}/bucket/{NAME}.npz", f"hf://{REPOSITORY}/model.safetensors"))
    said = str(error.value)
    assert f"file://{tmp_path}/mirror/{NAME}.npz: there is no such file; " in said
    assert f"{server.url}/bucket/{NAME}.npz: 403 Forbidden; " in said
    assert f"hf://{REPOSITORY}/model.safetensors: Connection refused" in said
    assert f"`gcloud storage cp gs://vit_models/{NAME}.npz .`" in said and "VIT_JAX_MIRROR" in said


def test_of_a_file_that_no_copy_holds_the_nearest_copies_are_told(server, monkeypatch):
    wanted = catalogue.resolve("L/16")
    assert len(wanted.addresses) == 1
    with pytest.raises(CheckpointError, match="of another training, the hub has imagenet21k/ViT-L_16 and augreg/L_16-i21k-"):
        fetch(dataclasses.replace(wanted, addresses=(f"{server.url}/nothing.npz",)))


def test_a_folder_that_cannot_be_written(server, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match="cannot be kept on this machine .*; make room, or set VIT_JAX_CACHE"):
        fetch(row(f"{server.url}/{NAME}.npz"))


def test_a_full_disk_is_not_the_server_s_fault(server, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        fetch(row(f"{server.url}/{NAME}.npz", f"{server.url}/another.npz"))
    assert len(server.asked) == 1


FETCH = """
import logging, sys
from vit_jax.checkpoints.catalogue import Published
from vit_jax.checkpoints.download import fetch
print("ready", flush=True)
sys.stdin.readline()
print(fetch(Published({name!r}, "Nano/8", 16, 3, ({address!r},), mib=3.1)))
"""


@pytest.mark.parametrize("killed", [False, True])
def test_two_processes_at_once_fetch_once(server, content, tmp_path, killed):
    """The second waits for the first; when that is killed, it goes on from what is there."""
    server.mood = lambda n, asked: {"pause": 0.02}
    script = FETCH.format(name=NAME, address=f"{server.url}/{NAME}.npz")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with contextlib.ExitStack() as stack:
        processes = []
        for _ in range(2):
            process = subprocess.Popen(
                [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                text=True, env=environment,
            )  # fmt: skip
            processes.append(stack.enter_context(process))
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        if killed:
            processes[0].stdin.write("go\n")
            processes[0].stdin.flush()
            part = tmp_path / "cache" / "imagenet21k" / ".Nano_8.npz.part"
            while not part.is_file() or part.stat().st_size < 500_000:
                time.sleep(0.005)
            processes[1].stdin.write("go\n")
            processes[1].stdin.flush()
            time.sleep(0.1)
            processes[0].kill()
            results = [processes[1].communicate(timeout=60)]
            processes[0].communicate()
        else:
            for process in processes:
                process.stdin.write("go\n")
                process.stdin.flush()
            results = [process.communicate(timeout=60) for process in processes]
    for printed, _ in results:
        assert Path(printed.strip()).read_bytes() == content
    assert "waiting for another process that downloads" in "".join(complaint for _, complaint in results)
    assert [asked.first > 0 for asked in server.gets()] == ([False, True] if killed else [False])


@pytest.mark.parametrize("kind", ["path", "file", "http"])
def test_a_mirror_comes_first(server, content, tmp_path, monkeypatch, kind):
    name = "imagenet21k+imagenet2012/Nano 8"  # what has to be quoted, is
    (tmp_path / "mirror" / name).parent.mkdir(parents=True)
    (tmp_path / "mirror" / f"{name}.npz").write_bytes(content)
    server.files["/mirror/imagenet21k%2Bimagenet2012/Nano%208.npz"] = content
    roots = {"path": str(tmp_path / "mirror"), "file": (tmp_path / "mirror").as_uri(), "http": f"{server.url}/mirror/"}
    monkeypatch.setenv("VIT_JAX_MIRROR", roots[kind])
    wanted = dataclasses.replace(row(f"{server.url}/elsewhere.npz"), name=name)
    path = fetch(wanted)
    assert path.read_bytes() == content and not server.gets("elsewhere") and local(wanted) == path
    if kind == "http":
        assert path == tmp_path / "cache" / f"{name}.npz"
    else:
        assert path == tmp_path / "mirror" / f"{name}.npz" and not (tmp_path / "cache").exists()


def test_what_a_mirror_lacks_or_has_wrong_comes_from_elsewhere(server, content, tmp_path, monkeypatch):
    monkeypatch.setenv("VIT_JAX_MIRROR", str(tmp_path / "mirror"))
    wanted = row(f"{server.url}/{NAME}.npz")
    (tmp_path / "mirror" / NAME).parent.mkdir(parents=True)
    (tmp_path / "mirror" / f"{NAME}.npz").write_bytes(another_model(tmp_path, num_classes=4))
    assert fetch(wanted) == tmp_path / "cache" / f"{NAME}.npz"
    monkeypatch.setenv("VIT_JAX_MIRROR", "gopher://mirror")
    with pytest.raises(CheckpointError, match=f"gopher://mirror/{NAME}.npz: not an address of a kind known here"):
        fetch(row(f"{server.url}/nothing.npz"), cache=tmp_path / "empty")


def test_the_embedded_file_asks_no_mirror(server, monkeypatch):
    monkeypatch.setenv("VIT_JAX_MIRROR", server.url)
    assert fetch("mini_8").parent.name == "assets" and local(PUBLISHED["mini_8"]) == find("mini_8") and not server.asked


@pytest.mark.parametrize("wrong", ["size", "head", "hash"])
def test_a_wrong_file_in_the_cache_is_refused(server, content, tmp_path, wrong):
    path = tmp_path / "cache" / f"{NAME}.npz"
    path.parent.mkdir(parents=True)
    path.write_bytes({"size": content[:-1], "hash": flipped(content), "head": another_model(tmp_path, num_classes=4)}[wrong])
    known = {} if wrong == "head" else {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    said = {"size": "has .* bytes", "hash": "has the SHA-256", "head": "has a head of 4 classes"}[wrong]
    with pytest.raises(CheckpointError, match=f"{path} {said}.*; remove that file from the cache, and it is fetched again"):
        fetch(row(f"{server.url}/{NAME}.npz", **known))
    assert not server.asked


# The hub.


@pytest.fixture
def hub(server, tensors, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    server.files[f"/{REPOSITORY}/resolve/main/model.safetensors"] = tensors["whole"]
    return f"hf://{REPOSITORY}/model.safetensors"


def test_a_copy_on_the_hub_is_converted(server, hub, tree, tensors, tmp_path, caplog):
    wanted = row(f"{server.url}/nothing.npz", hub)
    with caplog.at_level(logging.WARNING, "vit_jax"):
        path = fetch(wanted)
    assert f"downloading {server.url}/{REPOSITORY}/" in caplog.text
    assert path == tmp_path / "cache" / "copies" / f"{REPOSITORY}.npz" == local(wanted)
    found, expected = flatten_dict(read_npz(path), sep="/"), flatten_dict(tree, sep="/")
    assert found.keys() == expected.keys()
    assert all(found[name].tobytes() == expected[name].tobytes() for name in found)
    meta = read_meta(path)
    assert meta == {
        "image_size": 16,
        "source": hub,
        "source_sha256": hashlib.sha256(tensors["whole"]).hexdigest(),
        "copy_of": NAME,
        "lacks": [],
    }
    asked = len(server.asked)
    assert fetch(wanted) == path and len(server.asked) == asked
    assert kept(tmp_path) >= {f"copies/{REPOSITORY}.npz", f"copies/{REPOSITORY}.json"}
    assert not [name for name in kept(tmp_path) if "safetensors" in name and not name.endswith(".lock")]


@pytest.mark.parametrize("state", ["whole", "damaged", "another branch"])
def test_the_cache_of_the_hub_s_own_client_is_read(server, hub, tensors, tmp_path, state):
    digest = hashlib.sha256(tensors["whole"]).hexdigest()
    folder = tmp_path / "hub" / f"models--{REPOSITORY.replace('/', '--')}"
    for part in ("blobs", "refs", f"snapshots/{COMMIT}"):
        (folder / part).mkdir(parents=True)
    (folder / "blobs" / digest).write_bytes(flipped(tensors["whole"]) if state == "damaged" else tensors["whole"])
    (folder / "snapshots" / COMMIT / "model.safetensors").symlink_to(f"../../blobs/{digest}")
    (folder / "refs" / "main").write_text("../../../else" if state == "another branch" else COMMIT)
    before = sorted(folder.rglob("*"))
    assert read_meta(fetch(row(hub)))["source_sha256"] == digest
    assert len(server.asked) == (state != "whole") and sorted(folder.rglob("*")) == before


def test_the_hub_is_not_asked_when_it_is_set_offline(server, hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match=f"{hub}: HF_HUB_OFFLINE is set"):
        fetch(row(hub))
    assert not server.asked


@pytest.mark.parametrize("etag", ['"{outside}/evil.pth"', '"../../../../../../../../{outside}/evil.pth"', "", 'W/"x"'])
def test_a_hostile_hub_writes_nothing_outside_the_cache(server, hub, tmp_path, etag):
    """Whatever its headers say, and although what it sends is refused."""
    outside = tmp_path / "outside"
    etag = etag.format(outside=outside)
    server.etag = etag
    server.mood = lambda n, asked: {"linked": etag, "commit": "../../../outside", "body": b"evil"}
    with pytest.raises(CheckpointError, match=f"{hub}: not a copy of that file"):
        fetch(row(hub))
    assert not outside.exists() and not (tmp_path / "hub").exists()
    assert {path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()} == {
        ".nano_patch8_16.orig.npz.lock",
        ".nano_patch8_16.orig.safetensors.lock",
    }


def test_a_copy_without_the_head_serves_whoever_needs_none(server, hub, tensors, content, tmp_path, monkeypatch):
    server.files[f"/{REPOSITORY}/resolve/main/model.safetensors"] = tensors["headless"]
    wanted = row(f"{server.url}/later.npz", hub, headless=(hub,))
    path = fetch(wanted)
    assert "head" not in read_npz(path) and read_meta(path)["lacks"] == ["head", "pre_logits"]
    with pytest.raises(CheckpointError, match=f"later.npz: 404 Not Found; {hub}: a copy without the head, .*num_classes"):
        fetch(wanted, complete=True)
    server.files["/later.npz"] = content
    whole = fetch(wanted, complete=True)
    assert whole == tmp_path / "cache" / f"{NAME}.npz" and whole.read_bytes() == content
    assert fetch(wanted) == whole and path.is_file()  # the file itself before the copy, from now on


def test_a_copy_that_should_have_a_head_and_has_none_is_refused(server, hub, tensors):
    server.files[f"/{REPOSITORY}/resolve/main/model.safetensors"] = tensors["headless"]
    with pytest.raises(CheckpointError, match="not a copy of that file: .* has a head of 0 classes, that of .* has 3"):
        fetch(row(hub))


def test_google_s_copy_keeps_pre_logits(server, hub, tree, tmp_path):
    original = {name: leaf for name, leaf in tree.items() if name != "head"}
    original["pre_logits"] = {"kernel": np.ones((128, 128), np.float32), "bias": np.ones(128, np.float32)}
    save_file(to_huggingface(original)[0], tmp_path / "x.safetensors")
    server.files[f"/{REPOSITORY}/resolve/main/model.safetensors"] = (tmp_path / "x.safetensors").read_bytes()
    path = fetch(row(hub, headless=(hub,)))
    assert read_meta(path)["lacks"] == ["head"] and (read_npz(path)["pre_logits"]["kernel"] == 1).all()


def test_a_cut_download_from_the_hub_is_resumed(server, hub, tensors, tree):
    size = len(tensors["whole"])
    server.mood = lambda n, asked: {"cut": (n + 1) * size // 4} if n < 3 and asked.method == "GET" else None
    assert (read_npz(fetch(row(hub)))["cls"] == tree["cls"]).all()
    assert len(server.gets()) == 4 and sum(asked.sent for asked in server.gets()) <= size + 3 * (1 << 16)


HUB_FAILURES = {
    "403": ({"status": 403}, "403 Forbidden"),
    "404": ({"status": 404}, "404 Not Found"),
    "another length": ({"body": b"x" * 100}, "not that file: its SHA-256 is"),
    "stalls": ({"cut": 100, "stall": True}, "timed out"),
    "wrong bytes": ("flip", "not that file: its SHA-256 is .*, the server says"),
    "another model": ("headless", "not a copy of that file"),
}


@pytest.mark.parametrize("failure", HUB_FAILURES)
def test_when_the_hub_fails_the_next_address_is_tried(server, hub, tensors, content, failure):
    mood, said = HUB_FAILURES[failure]
    if mood == "headless":
        server.files[f"/{REPOSITORY}/resolve/main/model.safetensors"], mood = tensors["headless"], {}
    elif mood == "flip":
        mood = {"body": flipped(tensors["whole"])}
    server.mood = lambda n, asked: mood if "resolve" in asked.path else None
    with pytest.raises(CheckpointError, match=f"{hub}: .*({said})") as error:
        fetch(row(hub))
    assert "\n" not in str(error.value)
    assert fetch(row(hub, f"{server.url}/{NAME}.npz")).read_bytes() == content
    if failure == "wrong bytes":  # nor does the damaged file stay
        server.mood = lambda n, asked: None
        assert fetch(row(hub)).read_bytes()


# Names and folders.


def test_what_a_folder_stands_for(content, tmp_path):
    for name in ("model.safetensors", "best.npz", "final.npz"):
        (tmp_path / name).write_bytes(content)
        assert find(tmp_path) == find(str(tmp_path)) == tmp_path / name
    (tmp_path / "run").mkdir()
    with pytest.raises(CheckpointError, match="run is a folder without weights: it holds neither final.npz nor best.npz"):
        find(tmp_path / "run")


def test_an_existing_path_wins_over_a_name(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "B").mkdir()
    (tmp_path / "B" / "16").write_bytes(content)
    assert find("B/16") == Path("B/16")
    (tmp_path / "mini_8").mkdir()  # without weights it hides nothing
    assert find("mini_8").parent.name == "assets"


def test_a_short_name_says_which_file_it_is(tmp_path, monkeypatch, caplog):
    wanted = catalogue.resolve("Ti/16")
    flat = flatten_dict(shapes(build("Ti/16", num_classes=21843)), sep="/")
    path = tmp_path / "mirror" / f"{wanted.name}.npz"
    path.parent.mkdir(parents=True)
    np.savez(path, **{name: np.zeros(leaf.shape, np.float32) for name, leaf in flat.items()})
    monkeypatch.setenv("VIT_JAX_MIRROR", str(tmp_path / "mirror"))
    with caplog.at_level(logging.WARNING, "vit_jax"):
        assert find("Ti/16") == path
    assert f"Ti/16 is {wanted.name}, here as {path}" in caplog.text


@pytest.mark.parametrize("source", ["nothing.npz", "somewhere/ViT-B_16.npz", "ViT-S_16"])
def test_neither_a_file_nor_a_name(source):
    with pytest.raises(CheckpointError, match=f"there is no file {source}, and (no checkpoint|several files)"):
        find(source)


@pytest.mark.parametrize("source", ["x" * 300, "/nowhere/ViT-B_16.npz", "./ViT-B_16", "~/ViT-B_16", "../x"])
def test_what_can_only_be_a_path_is_offered_no_names(source):
    with pytest.raises(CheckpointError) as error:
        find(source)
    assert str(error.value) == f"there is no file {source[:200]}"


def test_augreg_s_index_is_fetched(server, tmp_path, monkeypatch):
    file = "B_16-i21k-300ep-lr_0.001-aug_none-wd_0.1-do_0.0-sd_0.0"
    monkeypatch.setenv("VIT_JAX_MIRROR", server.url)
    monkeypatch.setattr(download, "BUCKET", f"{server.url}/bucket")
    server.files["/augreg/index.csv"] = b"<html></html>"
    with pytest.raises(CheckpointError, match=r"index.csv could not be .*no column 'name'.*bucket/.*: 404 Not Found"):
        best("B/16")
    server.files["/augreg/index.csv"] = f"name,ds,final_val,filename\nB/16,i21k,0.5,{file}\n".encode()
    assert best("B/16").name == f"augreg/{file}" and best("b_16", index=download.fetch_index()).variant == "B/16"
    assert len(server.gets("/augreg/index.csv")) == 3 and (tmp_path / "cache" / "augreg" / "index.csv").is_file()
