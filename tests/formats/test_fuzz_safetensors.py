"""Damaged and malicious safetensors files: each is read correctly or refused in one line, with bounded memory."""

import json
import os
import struct
import tracemalloc

import numpy as np
import pytest
from safetensors.numpy import save_file

from vit_jax.checkpoints.load import read
from vit_jax.errors import CheckpointError
from vit_jax.formats import torch_files
from vit_jax.interop.torch_models import save_huggingface, save_timm, to_huggingface

# Damaged files of each kind and tool. The default makes more than 180 files, 20 make 1,200.
SEEDS = int(os.environ.get("VIT_JAX_FUZZ_SEEDS", "3"))


def unpacked(content: bytes) -> tuple[dict, bytes]:
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def packed(header: dict | str, data: bytes) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text)) + text + data


def flipped(content: bytes, place: int, draw) -> bytes:
    return content[:place] + bytes([content[place] ^ int(draw.integers(1, 256))]) + content[place + 1 :]


def renamed(header: dict, name: str, new: str) -> dict:
    return {new if key == name else key: entry for key, entry in header.items()}


def without(header: dict, data: bytes, name: str) -> bytes:
    """The file without a tensor, the others moved up."""
    start, end = header[name]["data_offsets"]
    kept = {key: dict(entry) for key, entry in header.items() if key != name}
    for key, entry in kept.items():
        if key != "__metadata__" and entry["data_offsets"][0] >= end:
            entry["data_offsets"] = [offset - (end - start) for offset in entry["data_offsets"]]
    return packed(kept, data[:start] + data[end:])


def added(header: dict, data: bytes, name: str, dtype: str, shape: list[int], more: bytes) -> bytes:
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(more)]}
    return packed({**header, name: entry}, data + more)


ODD_NAMES = ["", "../../etc/passwd", "blocks.0", "blocks..norm1.weight", "blocks.00.norm1.weight", "blocks.-1.norm1.weight",
             "blocks.99999.norm1.weight", "x" * 5000, "head.weight\n", "a\u0000b", "__proto__",
             "vit.vit.norm.weight"]  # fmt: skip


def mutate_bytes(kind: str, content: bytes, data: bytes, draw) -> bytes:
    """Damages the file's bytes, length or end."""
    if kind == "a byte of the header":
        return flipped(content, int(draw.integers(8, len(content) - len(data))), draw)
    if kind == "a byte of the data":
        return flipped(content, int(draw.integers(len(content) - len(data), len(content))), draw)
    if kind == "a byte of the length":
        return flipped(content, int(draw.integers(8)), draw)
    if kind == "oversized length":
        lengths = (2**63, 2**64 - 1, 2**32, len(content), len(content) - 8, 2**24, 0, 1)
        return struct.pack("<Q", lengths[draw.integers(len(lengths))]) + content[8:]
    if kind == "a bomb of a header":
        many = json.dumps({"__metadata__": {str(i): "" for i in range(60_000)}})
        bombs = ("[" * 500_000, '{"a":' * 100_000, " " * 3_000_000, many, "9" * 1_000_000, json.dumps("\0" * 100_000))
        return packed(bombs[draw.integers(len(bombs))], data)
    if kind == "truncated":
        return content[: draw.integers(len(content))]
    if kind == "longer":
        return content + bytes(int(draw.integers(1, 100)))
    assert kind == "something else"
    return (b"", b"PK\x03\x04", b"<html>403 Forbidden</html>", bytes(4096), b"\x80\x04K\x01.", b"{}")[draw.integers(6)]


def mutate(kind: str, content: bytes, draw) -> bytes:
    """Damages a file: names, shapes, types, offsets or values of a random tensor, or as `mutate_bytes`."""
    header, data = unpacked(content)
    names = [name for name in header if name != "__metadata__"]
    name = names[draw.integers(len(names))]
    other = names[draw.integers(len(names))]
    entry = header[name]
    start, end = entry["data_offsets"]
    if kind == "renamed":
        return packed(renamed(header, name, ODD_NAMES[draw.integers(len(ODD_NAMES))]), data)
    if kind == "renamed to another":
        return packed(renamed(header, name, other if other != name else f"{name}s"), data)
    if kind == "two names swapped":
        swapped = {key: dict(value) for key, value in header.items()}
        swapped[name], swapped[other] = swapped[other], swapped[name]
        return packed(swapped, data)
    if kind == "removed":
        return without(header, data, name)
    if kind == "removed from the header":
        return packed({key: value for key, value in header.items() if key != name}, data)
    if kind == "doubled":
        return added(header, data, f"vit.{name}" if draw.integers(2) else f"{name}.1", "F32", entry["shape"], data[start:end])
    if kind == "doubled in the header":
        text = json.dumps(header)
        return packed(f"{text[:-1]}, {json.dumps(name)}: {json.dumps(header[other])}}}", data)
    if kind == "reshaped":
        shapes = ([*entry["shape"], 1], [1, *entry["shape"]], entry["shape"][::-1], [-1], [2**62, 4], [0], [], ["x"], None)
        return packed({**header, name: {**entry, "shape": shapes[draw.integers(len(shapes))]}}, data)
    if kind == "retyped":
        dtype = ("I32", "U32", "F64", "F16", "BF16", "F8_E4M3", "BOOL", "C64", "f32", "", None)[draw.integers(11)]
        return packed({**header, name: {**entry, "dtype": dtype}}, data)
    if kind == "retyped to size":
        dtype, size = (("F64", 8), ("I64", 8), ("U8", 1), ("F8_E5M2", 1))[draw.integers(4)]
        kept = without(header, data, name)
        header, data = unpacked(kept)
        return added(header, data, name, dtype, entry["shape"], bytes(size * int(np.prod(entry["shape"]))))
    if kind == "not finite":
        value = np.float32([np.nan, np.inf, -np.inf][draw.integers(3)]).tobytes()
        return packed(header, data[:start] + value + data[start + 4 :])
    if kind == "offsets moved":
        moves = ([start, end + 4], [start - 4, end], [end, start], [0, 2**60], [-4, 0], [start, 2**64], [1.5, 2], [])
        return packed({**header, name: {**entry, "data_offsets": moves[draw.integers(len(moves))]}}, data)
    if kind == "other metadata":
        metadata = dict(header.get("__metadata__", {}))
        changes = (
            {"num_heads": "4"},
            {"num_heads": "²"},
            {"num_heads": 3},
            {torch_files._HASHES: "{}"},
            {torch_files._HASHES: "["},
        )
        return packed({**header, "__metadata__": {**metadata, **changes[draw.integers(len(changes))]}}, data)
    return mutate_bytes(kind, content, data, draw)


KINDS = [
    "a byte of the header", "a byte of the data", "a byte of the length", "renamed", "renamed to another", "two names swapped",
    "removed", "removed from the header", "doubled", "doubled in the header", "reshaped", "retyped", "retyped to size",
    "not finite", "offsets moved", "oversized length", "a bomb of a header", "truncated", "longer", "other metadata",
    "something else",
]  # fmt: skip
UNMARKED = {"a byte of the data", "two names swapped", "other metadata"}  # not detectable in a file without hashes


def timm_file(folder, trees, since_five):
    save_timm(folder, trees["plain"])
    return trees["plain"]


def huggingface_file(folder, trees, since_five):
    save_huggingface(folder, trees["pre_logits"])
    return trees["pre_logits"]


def foreign_file(folder, trees, since_five):
    """As another tool writes it: no hashes, the heads in config.json."""
    folder.mkdir()
    save_file(since_five(to_huggingface(trees["plain"])[0]), folder / "model.safetensors")
    (folder / "config.json").write_text('{"num_attention_heads": 3}')
    return trees["plain"]


MAKERS = [timm_file, huggingface_file, foreign_file]


@pytest.mark.parametrize("maker", MAKERS)
def test_damaged_safetensors_is_read_correctly_or_refused(maker, trees, since_five, assert_same, tmp_path):
    expected = maker(tmp_path / "good", trees, since_five)
    content = (tmp_path / "good" / "model.safetensors").read_bytes()
    path = tmp_path / "good" / "bad.safetensors"
    draw = np.random.default_rng(MAKERS.index(maker))

    def peak(content: bytes) -> tuple[int, str]:
        """Returns the peak of bytes while reading, and the error message if any."""
        path.write_bytes(content)
        tracemalloc.start()
        try:
            found = read(path)[1]
            message = ""
        except CheckpointError as error:
            found, message = expected, str(error)
        finally:
            most = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert_same(found, expected)
        return most, message

    peak(content)  # traces the model once
    honest, message = peak(content)
    assert not message
    counts = dict.fromkeys(KINDS, 0)
    for kind in KINDS:
        if maker is foreign_file and kind in UNMARKED:
            continue
        for _ in range(SEEDS):
            damaged = mutate(kind, content, draw)
            most, message = peak(damaged)
            assert most < 2 * max(honest, len(damaged)), (kind, message)
            assert message.isprintable() and len(message) < 600 and (not message or "bad.safetensors" in message), message
            counts[kind] += bool(message)
    assert sum(counts.values()) > 0.8 * SEEDS * (len(KINDS) - 3), counts
    assert all(count for kind, count in counts.items() if maker is not foreign_file or kind not in UNMARKED), counts
