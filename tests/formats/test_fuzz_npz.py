"""Damaged and malicious npz files: each is read correctly or refused in one line, with bounded memory."""

import io
import os
import re
import struct
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from vit_jax.checkpoints.load import load
from vit_jax.errors import CheckpointError
from vit_jax.formats.google import save_npz
from vit_jax.models.variants import build, shapes

SEEDS = int(os.environ.get("VIT_JAX_FUZZ_SEEDS", "4"))  # files of each kind of damage; 240 make more than 3,000 files


def npy(array, **kwargs) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, **kwargs)
    return file.getvalue()


def raw_npy(header: bytes, values: bytes, length: int | None = None) -> bytes:
    """A member with any header and any stated length of it."""
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) if length is None else length) + header + values


def pack(members: list[tuple[str, bytes]], compression=zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members:
            # Our own ZipInfo, because `writestr` corrects names and warns of duplicates.
            info = zipfile.ZipInfo("x")
            info.filename, info.compress_type = name, compression
            archive.writestr(info, content)
    return file.getvalue()


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    """A small published-form file: its bytes and its arrays."""
    model = build("B/8", hidden_size=64, num_layers=2, num_heads=2, mlp_dim=128, num_classes=500, representation_size=32)
    draw = np.random.default_rng(0)
    flat = {
        name: draw.normal(size=leaf.shape).astype(np.float32) for name, leaf in flatten_dict(shapes(model, 32), sep="/").items()
    }
    path = tmp_path_factory.mktemp("honest") / "x.npz"
    save_npz(path, flat)
    return path.read_bytes(), flat


def members_of(content: bytes) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def replaced(content: bytes, draw, change) -> bytes:
    """The file with a random member replaced by the result of `change` for its name and array."""
    members = members_of(content)
    at = int(draw.integers(len(members)))
    name, old = members[at]
    members[at : at + 1] = change(name, np.load(io.BytesIO(old)), old)
    return pack(members)


def flipped(content, draw):
    content = bytearray(content)
    for at in draw.integers(len(content), size=draw.integers(1, 9)):
        content[at] ^= 1 << draw.integers(8)
    return bytes(content)


def flipped_directory(content, draw):
    """Flips bits in the zip's own records, which are a small part of the bytes."""
    content, begin = bytearray(content), content.rindex(b"PK\x01\x02") - 3000
    for at in draw.integers(begin, len(content), size=draw.integers(1, 5)):
        content[at] ^= 1 << draw.integers(8)
    return bytes(content)


def flipped_header(content, draw):
    content = bytearray(content)
    starts = [found.start() for found in re.finditer(b"\x93NUMPY", bytes(content))]
    at = starts[draw.integers(len(starts))] + draw.integers(128)
    content[at] ^= 1 << draw.integers(8)
    return bytes(content)


def cut(content, draw):
    return content[: draw.integers(len(content))]


def renamed(content, draw):
    names = [
        "head/kernle",
        "encoderblock_0/x",
        "Transformer/encoderblock_7/LayerNorm_0/scale",
        "block1/unit1/conv1/kernel",
        "head",
    ]
    return replaced(content, draw, lambda name, array, old: [(f"{names[draw.integers(len(names))]}.npy", old)])


def removed(content, draw):
    return replaced(content, draw, lambda name, array, old: [])


def doubled(content, draw):
    other = ["", "params/", "opt/target/"][draw.integers(3)]
    return replaced(content, draw, lambda name, array, old: [(name, old), (other + name, old)])


def reshaped(content, draw):
    def change(name, array, old):
        shapes = [(-1,), (1, *array.shape), (*array.shape, 1), array.shape[::-1], (array.size, 1, 1), (0,), ()]
        shape = shapes[draw.integers(len(shapes))]
        new = array.reshape(shape) if np.prod(shape) not in (0, 1) or array.size == 1 else np.zeros(shape, np.float32)
        return [(name, old if new.shape == array.shape else npy(new))]

    return replaced(content, draw, change)


def retyped(content, draw):
    def change(name, array, old):
        kinds = [np.int32, np.float64, np.complex64, bool, object, "S4", "U4", "V4", [("a", "f4")], "M8[s]"]
        kind = kinds[draw.integers(len(kinds))]
        return [(name, npy(array.astype(kind, copy=False) if kind != "M8[s]" else array.astype("i8").astype(kind)))]

    return replaced(content, draw, change)


def odd_header(content, draw):
    def change(name, array, old):
        values, text = array.tobytes(), repr({"descr": "<f4", "fortran_order": False, "shape": array.shape}).encode()
        huge = text.replace(repr(array.shape).encode(), b"(1099511627776, 1048576)")
        negative = text.replace(repr(array.shape).encode(), b"(-1, -%d)" % array.size)
        return [
            (
                name,
                [
                    raw_npy(text.ljust(60_000), values),
                    raw_npy(text, values, 65_535),
                    raw_npy(huge, values),
                    raw_npy(negative, values),
                    raw_npy(b"(" * 9_000, values),
                    raw_npy(text.replace(b"'<f4'", b"'|O'"), values),
                    raw_npy(text.replace(b"False", b"__import__('os')"), values),
                    raw_npy(b"{'descr': '<f4'}", values),
                    b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1) + text + values,
                    b"\x93NUMPY\x09\x00" + old[8:],
                    values,
                    b"",
                ][draw.integers(12)],
            )
        ]

    return replaced(content, draw, change)


def bomb(content, draw):
    """A member of zeros that unpacks to a hundred times the file, under a name that allows any length."""
    members = members_of(content)
    rows = 40_000 + int(draw.integers(1000))
    zeros = npy(np.zeros((1, rows, 64), np.float32))
    name = ["Transformer/posembed_input/pos_embedding.npy", "momentum/kernel.npy", "opt/state/x.npy"][draw.integers(3)]
    return pack([(n, zeros if n == name else c) for n, c in [*members, *([] if name in dict(members) else [(name, b"")])]],
                zipfile.ZIP_DEFLATED)  # fmt: skip


def overlapped(content, draw):
    """Every entry of the zip's directory points to one member, which would be read many times."""
    content = bytearray(content)
    begins = [found.start() for found in re.finditer(b"PK\x01\x02", bytes(content))]
    for at in begins[1:]:
        content[at + 42 : at + 46] = content[begins[0] + 42 : begins[0] + 46]
    return bytes(content)


def path_trick(content, draw):
    tricks = ["../{}", "/{}", "..\\{}", "./{}", "a//{}", "{}/../x.npy", "C:/{}", "\x00{}", "{}\n.npy", " {}", "~/{}", "{}.exe"]
    return replaced(content, draw, lambda name, array, old: [(tricks[draw.integers(len(tricks))].format(name), old)])


DAMAGE = [flipped, flipped_directory, flipped_header, cut, renamed, removed, doubled, reshaped, retyped, odd_header, bomb,
          overlapped, path_trick]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__)
def test_damaged_npz_is_read_correctly_or_refused(damage, honest, tmp_path, monkeypatch):
    content, expected = honest
    path = tmp_path / "x.npz"
    path.write_bytes(content)
    load(path)  # traces the model once, so that the memory is not counted below
    tracemalloc.start()
    try:
        load(path)
        allowed = 2 * tracemalloc.get_traced_memory()[1]
        refused = 0
        for seed in range(SEEDS):
            path.write_bytes(damage(content, np.random.default_rng([DAMAGE.index(damage), seed])))
            tracemalloc.clear_traces()
            begin = time.perf_counter()
            try:
                found = flatten_dict(load(path)[1], sep="/")
            except CheckpointError as error:
                refused += 1
                assert str(path) in str(error) and "\n" not in str(error) and len(str(error)) < 400
            else:
                assert found.keys() == expected.keys(), seed
                assert all(np.array_equal(leaf, expected[name]) for name, leaf in found.items()), seed
                del found
            assert tracemalloc.get_traced_memory()[1] < allowed, seed
            assert time.perf_counter() - begin < 20, seed
    finally:
        tracemalloc.stop()
    assert refused >= SEEDS // 4  # the damage has an effect
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["x.npz"]
