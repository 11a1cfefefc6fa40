"""Copies on the Hugging Face hub: converted to npz, read from its client's cache, and refused if they are something else."""

import hashlib
import logging

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from vit_jax.checkpoints.catalogue import Published
from vit_jax.checkpoints.download import fetch, local
from vit_jax.errors import CheckpointError
from vit_jax.formats.google import read_meta, read_npz
from vit_jax.interop.torch_models import to_huggingface

pytestmark = pytest.mark.usefixtures("isolated")
NAME = "imagenet21k/Nano_8"
REPOSITORY = "timm/nano_patch8_16.orig"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def row(*addresses: str, **fields) -> Published:
    return Published(NAME, "Nano/8", 16, 3, addresses, **{"mib": 3.1, **fields})


def flipped(content: bytes) -> bytes:
    """The content with one bit flipped in the values of an array."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def kept(tmp_path) -> set[str]:
    return {str(path.relative_to(tmp_path / "cache")) for path in (tmp_path / "cache").rglob("*") if path.is_file()}


@pytest.fixture
def hub(server, tensors, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    server.files[f"/{REPOSITORY}/resolve/main/model.safetensors"] = tensors["whole"]
    return f"hf://{REPOSITORY}/model.safetensors"


def test_copy_is_converted_to_npz(server, hub, tree, tensors, tmp_path, caplog):
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
def test_cache_of_the_hub_client_is_only_read(server, hub, tensors, tmp_path, state):
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


def test_offline_variable_is_respected(server, hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match=f"{hub}: HF_HUB_OFFLINE is set"):
        fetch(row(hub))
    assert not server.asked


@pytest.mark.parametrize("etag", ['"{outside}/evil.pth"', '"../../../../../../../../{outside}/evil.pth"', "", 'W/"x"'])
def test_hostile_hub_writes_nothing_outside_the_cache(server, hub, tmp_path, etag):
    outside = tmp_path / "outside"
    etag = etag.format(outside=outside)
    server.etag = etag
    server.mood = lambda n, asked: {"linked": etag, "commit": "../../../outside", "body": b"evil"}
    with pytest.raises(CheckpointError, match=f"{hub}: not a copy of {NAME}: "):
        fetch(row(hub))
    assert not outside.exists() and not (tmp_path / "hub").exists()
    assert {path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()} == {
        ".nano_patch8_16.orig.npz.lock",
        ".nano_patch8_16.orig.safetensors.lock",
    }


def test_copy_without_head_is_used_if_the_head_is_not_needed(server, hub, tensors, content, tmp_path, monkeypatch):
    server.files[f"/{REPOSITORY}/resolve/main/model.safetensors"] = tensors["headless"]
    wanted = row(f"{server.url}/later.npz", hub, headless=(hub,))
    path = fetch(wanted)
    assert "head" not in read_npz(path) and read_meta(path)["lacks"] == ["head", "pre_logits"]
    with pytest.raises(CheckpointError, match=f"later.npz: 404 Not Found; {hub}: this copy has no head, .*num_classes"):
        fetch(wanted, complete=True)
    server.files["/later.npz"] = content
    whole = fetch(wanted, complete=True)
    assert whole == tmp_path / "cache" / f"{NAME}.npz" and whole.read_bytes() == content
    assert fetch(wanted) == whole and path.is_file()  # the file itself takes precedence over the copy


def test_copy_without_its_head_is_refused(server, hub, tensors):
    server.files[f"/{REPOSITORY}/resolve/main/model.safetensors"] = tensors["headless"]
    with pytest.raises(CheckpointError, match="not a copy of .*: .* has a head of 0 classes, .* has 3"):
        fetch(row(hub))


def test_copy_by_google_keeps_pre_logits(server, hub, tree, tmp_path):
    original = {name: leaf for name, leaf in tree.items() if name != "head"}
    original["pre_logits"] = {"kernel": np.ones((128, 128), np.float32), "bias": np.ones(128, np.float32)}
    save_file(to_huggingface(original)[0], tmp_path / "x.safetensors")
    server.files[f"/{REPOSITORY}/resolve/main/model.safetensors"] = (tmp_path / "x.safetensors").read_bytes()
    path = fetch(row(hub, headless=(hub,)))
    assert read_meta(path)["lacks"] == ["head"] and (read_npz(path)["pre_logits"]["kernel"] == 1).all()


def test_cut_download_from_the_hub_is_resumed(server, hub, tensors, tree):
    size = len(tensors["whole"])
    server.mood = lambda n, asked: {"cut": (n + 1) * size // 4} if n < 3 and asked.method == "GET" else None
    assert (read_npz(fetch(row(hub)))["cls"] == tree["cls"]).all()
    assert len(server.gets()) == 4 and sum(asked.sent for asked in server.gets()) <= size + 3 * (1 << 16)


HUB_FAILURES = {
    "403": ({"status": 403}, "403 Forbidden"),
    "404": ({"status": 404}, "404 Not Found"),
    "another length": ({"body": b"x" * 100}, "its SHA-256 is"),
    "stalls": ({"cut": 100, "stall": True}, "timed out"),
    "wrong bytes": ("flip", "its SHA-256 is "),
    "another model": ("headless", "not a copy of "),
}


@pytest.mark.parametrize("failure", HUB_FAILURES)
def test_failed_hub_is_reported_and_the_next_address_is_tried(server, hub, tensors, content, failure):
    mood, expected = HUB_FAILURES[failure]
    if mood == "headless":
        server.files[f"/{REPOSITORY}/resolve/main/model.safetensors"], mood = tensors["headless"], {}
    elif mood == "flip":
        mood = {"body": flipped(tensors["whole"])}
    server.mood = lambda n, asked: mood if "resolve" in asked.path else None
    with pytest.raises(CheckpointError, match=f"{hub}: .*({expected})") as error:
        fetch(row(hub))
    assert "\n" not in str(error.value)
    assert fetch(row(hub, f"{server.url}/{NAME}.npz")).read_bytes() == content
    if failure == "wrong bytes":  # the damaged file is not kept
        server.mood = lambda n, asked: None
        assert fetch(row(hub)).read_bytes()
