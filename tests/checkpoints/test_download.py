"""Downloads from a server on loopback: resumed, checked, tried at the next address, and reported with every answer."""

import dataclasses
import errno
import hashlib
import logging
import os
from pathlib import Path

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from vit_jax import fetch as fetching
from vit_jax import files
from vit_jax.checkpoints import catalogue, download
from vit_jax.checkpoints.catalogue import PUBLISHED, Published
from vit_jax.checkpoints.download import best, fetch, find, local
from vit_jax.errors import CheckpointError
from vit_jax.models.variants import build, shapes

pytestmark = pytest.mark.usefixtures("isolated")
NAME = "imagenet21k/Nano_8"
COPY = "hf://timm/nano_patch8_16.orig/model.safetensors"


def row(*addresses: str, **fields) -> Published:
    return Published(NAME, "Nano/8", 16, 3, addresses, **{"mib": 3.1, **fields})


def flipped(content: bytes) -> bytes:
    """The content with one bit flipped in the values of an array."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def sha256(path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def kept(tmp_path) -> set[str]:
    return {str(path.relative_to(tmp_path / "cache")) for path in (tmp_path / "cache").rglob("*") if path.is_file()}


def another_model(tmp_path, **fields) -> bytes:
    flat = flatten_dict(shapes(build("Nano/8", **{"num_classes": 3, **fields}), fields.get("image_size", 16)), sep="/")
    np.savez(tmp_path / "another.npz", **{name: np.zeros(leaf.shape, np.float32) for name, leaf in flat.items()})
    return (tmp_path / "another.npz").read_bytes()


def test_file_is_downloaded_once(server, content, tmp_path, caplog):
    wanted = row(f"{server.url}/{NAME}.npz", size=len(content), sha256=hashlib.sha256(content).hexdigest())
    assert local(wanted) is None
    with caplog.at_level(logging.WARNING, "vit_jax"):
        path = fetch(wanted)
    assert path == tmp_path / "cache" / f"{NAME}.npz" and path.read_bytes() == content
    assert f"downloading {server.url}/{NAME}.npz ({len(content) / 1e6:.1f} MB)" in caplog.text
    assert fetch(wanted) == local(wanted) == path and len(server.asked) == 1
    assert kept(tmp_path) == {f"{NAME}.npz", "imagenet21k/.Nano_8.npz.lock"}
    assert fetch(wanted, cache=tmp_path / "another") == tmp_path / "another" / f"{NAME}.npz"


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    assert files.cache_root() == tmp_path / "cache"
    monkeypatch.delenv("VIT_JAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert files.cache_root() == tmp_path / "xdg" / "vit_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert files.cache_root() == Path.home() / ".cache" / "vit_jax"


def test_missing_network_is_reported_at_once(monkeypatch, closed_address):
    monkeypatch.setattr(fetching, "_PAUSES", (60.0, 60.0))
    with pytest.raises(CheckpointError, match="^no network: Nano_8 could not be .*: .*(Connection refused.*){2}"):
        fetch(row(f"{closed_address}/{NAME}.npz", COPY))


# Kind of failure → the server's mood, and the expected answer.
FAILURES = {
    "403": (lambda content, tmp_path: {"status": 403}, "403 Forbidden"),
    "404": (lambda content, tmp_path: {"status": 404}, "404 Not Found"),
    "500": (lambda content, tmp_path: {"status": 500}, "500 Internal Server Error"),
    "refuses": (None, "Connection refused"),
    "stalls": (lambda content, tmp_path: {"body": content, "cut": 100_000, "stall": True}, "timed out"),
    "stalls at once": (lambda content, tmp_path: {"body": content, "cut": 0, "stall": True}, "timed out"),
    "too short": (lambda content, tmp_path: {"body": content[:-9]}, "bytes, expected"),
    "shorter than it says": (lambda content, tmp_path: {"body": content[:-9], "length": len(content)}, "IncompleteRead|bytes"),
    "wrong bytes": (lambda content, tmp_path: {"body": flipped(content)}, "SHA-256|damaged"),
    "a page": (
        lambda content, tmp_path: {"body": b"<html>log in, please</html>"},
        "it is not an npz file or is truncated|bytes, expected",
    ),
    "nothing": (lambda content, tmp_path: {"body": b""}, "it is empty|0 bytes, expected"),
    "another head": (
        lambda content, tmp_path: {"body": another_model(tmp_path, num_classes=4)},
        "it has a head of 4 classes, .* has 3|bytes, expected",
    ),
    "another depth": (
        lambda content, tmp_path: {"body": another_model(tmp_path, num_layers=2)},
        "it is not the Nano/8 of .*: num_layers is 2, expected 4|bytes, expected",
    ),
}


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("failure", FAILURES)
def test_failed_address_is_reported_and_the_next_is_tried(server, closed_address, content, tmp_path, failure, exact):
    """`exact`: size and hash are known. Else only the arrays and their checksums show the failure."""
    make, expected = FAILURES[failure]
    if failure == "too short" and not exact:
        expected = "it is not an npz file or is truncated"
    mood = make(content, tmp_path) if make else {}
    bad = f"{server.url if make else closed_address}/bad.npz"
    server.mood = lambda n, asked: mood if "bad" in asked.path else None
    known = dict(size=len(content), sha256=hashlib.sha256(content).hexdigest()) if exact else {}
    with pytest.raises(CheckpointError, match=f"Nano_8 could not be downloaded: .*tried: {bad}: .*({expected})") as error:
        fetch(row(bad, **known))
    assert "\n" not in str(error.value)
    assert not any(name.endswith(".npz") for name in kept(tmp_path))
    assert fetch(row(bad, f"{server.url}/{NAME}.npz", **known)).read_bytes() == content


def test_error_has_every_answer_and_what_to_do(server, tmp_path, monkeypatch):
    server.mood = lambda n, asked: {"status": 403} if "bucket" in asked.path else None
    monkeypatch.setattr(download, "BUCKET", f"{server.url}/bucket")
    monkeypatch.setenv("VIT_JAX_MIRROR", str(tmp_path / "mirror"))
    with pytest.raises(CheckpointError) as error:
        fetch(row(f"{server.url}/bucket/{NAME}.npz", COPY))
    message = str(error.value)
    assert f"file://{tmp_path}/mirror/{NAME}.npz: there is no such file; " in message
    assert f"{server.url}/bucket/{NAME}.npz: 403 Forbidden; " in message
    assert f"{COPY}: Connection refused" in message
    assert f"`gcloud storage cp gs://vit_models/{NAME}.npz .`" in message and "VIT_JAX_MIRROR" in message


def test_error_names_similar_files_on_the_hub(server, monkeypatch):
    wanted = catalogue.resolve("L/16")
    assert len(wanted.addresses) == 1
    with pytest.raises(
        CheckpointError, match="the hub has similar files from other trainings: imagenet21k/ViT-L_16, augreg/L_16-i21k-"
    ):
        fetch(dataclasses.replace(wanted, addresses=(f"{server.url}/nothing.npz",)))


def test_cache_that_cannot_be_written_is_an_error(server, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match="cannot be stored on this machine .*; free some space, or set VIT_JAX_CACHE"):
        fetch(row(f"{server.url}/{NAME}.npz"))


def test_full_disk_ends_the_search(server, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        fetch(row(f"{server.url}/{NAME}.npz", f"{server.url}/another.npz"))
    assert len(server.asked) == 1


@pytest.mark.parametrize("kind", ["path", "file", "http"])
def test_mirror_is_tried_first(server, content, tmp_path, monkeypatch, kind):
    name = "imagenet21k+imagenet2012/Nano 8"  # has characters that must be quoted
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


def test_file_that_a_mirror_has_not_or_wrong_comes_from_another_address(server, content, tmp_path, monkeypatch):
    monkeypatch.setenv("VIT_JAX_MIRROR", str(tmp_path / "mirror"))
    wanted = row(f"{server.url}/{NAME}.npz")
    (tmp_path / "mirror" / NAME).parent.mkdir(parents=True)
    (tmp_path / "mirror" / f"{NAME}.npz").write_bytes(another_model(tmp_path, num_classes=4))
    assert fetch(wanted) == tmp_path / "cache" / f"{NAME}.npz"
    monkeypatch.setenv("VIT_JAX_MIRROR", "gopher://mirror")
    with pytest.raises(CheckpointError, match=f"gopher://mirror/{NAME}.npz: unknown kind of address"):
        fetch(row(f"{server.url}/nothing.npz"), cache=tmp_path / "empty")


def test_embedded_file_needs_no_mirror(server, monkeypatch):
    monkeypatch.setenv("VIT_JAX_MIRROR", server.url)
    assert fetch("mini_8").parent.name == "assets" and local(PUBLISHED["mini_8"]) == find("mini_8") and not server.asked


@pytest.mark.parametrize("wrong", ["size", "head", "hash"])
def test_wrong_file_in_the_cache_is_refused(server, content, tmp_path, wrong):
    path = tmp_path / "cache" / f"{NAME}.npz"
    path.parent.mkdir(parents=True)
    path.write_bytes({"size": content[:-1], "hash": flipped(content), "head": another_model(tmp_path, num_classes=4)}[wrong])
    known = {} if wrong == "head" else {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    message = {"size": "has .* bytes", "hash": "has the SHA-256", "head": "has a head of 4 classes"}[wrong]
    with pytest.raises(CheckpointError, match=f"{path} {message}.*; remove this file from the cache to download it again"):
        fetch(row(f"{server.url}/{NAME}.npz", **known))
    assert not server.asked


def test_folder_means_its_weights(content, tmp_path):
    for name in ("model.safetensors", "best.npz", "final.npz"):
        (tmp_path / name).write_bytes(content)
        assert find(tmp_path) == find(str(tmp_path)) == tmp_path / name
    (tmp_path / "run").mkdir()
    with pytest.raises(
        CheckpointError, match="run is a folder without weights: it has none of final.npz, best.npz, model.safetensors"
    ):
        find(tmp_path / "run")


def test_existing_path_takes_precedence_over_a_name(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "B").mkdir()
    (tmp_path / "B" / "16").write_bytes(content)
    assert find("B/16") == Path("B/16")
    (tmp_path / "mini_8").mkdir()  # without weights it hides nothing
    assert find("mini_8").parent.name == "assets"


def test_short_name_is_logged_with_its_file(tmp_path, monkeypatch, caplog):
    wanted = catalogue.resolve("Ti/16")
    flat = flatten_dict(shapes(build("Ti/16", num_classes=21843)), sep="/")
    path = tmp_path / "mirror" / f"{wanted.name}.npz"
    path.parent.mkdir(parents=True)
    np.savez(path, **{name: np.zeros(leaf.shape, np.float32) for name, leaf in flat.items()})
    monkeypatch.setenv("VIT_JAX_MIRROR", str(tmp_path / "mirror"))
    with caplog.at_level(logging.WARNING, "vit_jax"):
        assert find("Ti/16") == path
    assert f"Ti/16 is {wanted.name}, stored as {path}" in caplog.text


@pytest.mark.parametrize("source", ["nothing.npz", "somewhere/ViT-B_16.npz", "ViT-S_16"])
def test_unknown_source_is_an_error(source):
    with pytest.raises(CheckpointError, match=f"there is no file {source}, and (no checkpoint|several files)"):
        find(source)


@pytest.mark.parametrize("source", ["x" * 300, "/nowhere/ViT-B_16.npz", "./ViT-B_16", "~/ViT-B_16", "../x"])
def test_missing_path_is_an_error_without_names(source):
    with pytest.raises(CheckpointError) as error:
        find(source)
    assert str(error.value) == f"there is no file {source[:200]}"


def test_augreg_index_is_downloaded(server, tmp_path, monkeypatch):
    file = "B_16-i21k-300ep-lr_0.001-aug_none-wd_0.1-do_0.0-sd_0.0"
    monkeypatch.setenv("VIT_JAX_MIRROR", server.url)
    monkeypatch.setattr(download, "BUCKET", f"{server.url}/bucket")
    server.files["/augreg/index.csv"] = b"<html></html>"
    with pytest.raises(CheckpointError, match=r"index.csv could not be .*no column 'name'.*bucket/.*: 404 Not Found"):
        best("B/16")
    server.files["/augreg/index.csv"] = f"name,ds,final_val,filename\nB/16,i21k,0.5,{file}\n".encode()
    assert best("B/16").name == f"augreg/{file}" and best("b_16", index=download.fetch_index()).variant == "B/16"
    assert len(server.gets("/augreg/index.csv")) == 3 and (tmp_path / "cache" / "augreg" / "index.csv").is_file()
