"""Npz files with impossible headers, sizes or directories, and files that are replaced during reading."""

import io
import struct
import threading
import zipfile

import numpy as np
import pytest

from vit_jax.errors import CheckpointError
from vit_jax.formats.google import read_npz, read_shapes, save_npz
from vit_jax.formats.npz import Npz


def member(descr: str, shape: str, values: bytes) -> bytes:
    """An npy file whose header holds the given Python expressions."""
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + values


def packed(**members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return file.getvalue()


HEADERS = {
    "65 axes": ("'<f4'", f"({65 * '1,'})", bytes(4), r"it has 65 axes"),
    "a side that is a truth value": ("'<f4'", "(True, 2)", bytes(8), r"its shape is \(True, 2\)"),
    "a negative side": ("'<f4'", "(-1, -2)", bytes(8), r"its shape is \(-1, -2\)"),
    "a side of 300 digits": ("'<f4'", f"({300 * '9'},)", bytes(8), r"there are 8"),
    "a huge side next to an empty one": ("'<f4'", f"(0, {300 * '9'})", b"", r"takes 0 bytes, there are 0"),
    "huge sides next to an empty one": ("'<f4'", f"(0, {2**40}, {2**40})", b"", r"takes 0 bytes, there are 0"),
    "a type that is an array": ("('<f4', (2,))", "(1,)", bytes(8), r"its type .* is an array"),
    "a type with fields": ("[('a', '<f4')]", "(2,)", bytes(8), r"has type \[\('a', '<f4'\)\]"),
    "a type that NumPy does not know": ("'<f3'", "(2,)", bytes(6), r"cannot be read"),
}


@pytest.mark.parametrize("kind", HEADERS)
@pytest.mark.parametrize("read", [read_npz, read_shapes])
def test_header_that_describes_no_array_is_one_error_line(kind, read, tmp_path):
    descr, shape, values, expected = HEADERS[kind]
    (tmp_path / "x.npz").write_bytes(packed(cls=member(descr, shape, values)))
    if kind == "a type with fields" and read is read_shapes:
        return  # it reports stored types without a check
    with pytest.raises(CheckpointError, match=f"x.npz: 'cls' .*{expected}") as error:
        read(tmp_path / "x.npz")
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_number_of_members_is_bounded(tmp_path):
    (tmp_path / "x.npz").write_bytes(packed(**{f"a{i}": b"" for i in range(10_001)}))
    with pytest.raises(CheckpointError, match="holds 10001 members, an npz of weights has at most 10000"):
        Npz(tmp_path / "x.npz")


def test_file_replaced_during_reading_is_read_as_it_was(tmp_path):
    path = tmp_path / "x.npz"
    save_npz(path, {"cls": np.full(1000, 1, np.float32)})
    with Npz(path) as file:
        before = file.header("cls")
        save_npz(path, {"longer/name": np.full(2000, 2, np.float32)})
        found = []
        for _ in range(2):
            thread = threading.Thread(target=lambda: found.append(file.values(before)))
            thread.start()
            thread.join()
    assert all(np.array_equal(values, np.ones(1000, np.float32)) for values in found) and len(found) == 2
