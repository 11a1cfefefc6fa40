"""Npz files that hold no weights or damaged ones: each is one error line, and nothing is unpickled."""

import pickle
import struct
import zipfile
import zlib

import numpy as np
import pytest

from vit_jax.errors import CheckpointError
from vit_jax.formats.google import read_npz

from .conftest import linen, published


class Trap:
    """Unpickling this writes a file, which proves that it happened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def write(path, kind, tree):
    """Writes a file with damaged bytes; returns the expected error."""
    whole = path.parent / "whole.npz"
    np.savez(whole, **published(tree))
    content = whole.read_bytes()
    if kind == "missing":
        return "there is no file"
    if kind == "a folder":
        path.mkdir()
        return "is a folder"
    if kind == "empty":
        path.write_bytes(b"")
        return "is empty"
    if kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
        return "is not an npz file or is truncated"
    if kind == "a page":
        path.write_bytes(b"<html>403 Forbidden</html>")
        return "is not an npz file or is truncated"
    if kind == "corrupt":
        place = content.index(b"conv_root/kernel.npy") + 1000
        path.write_bytes(content[:place] + bytes(4) + content[place + 4 :])
        return "'conv_root/kernel' cannot be read .*CRC"
    if kind == "another zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("word/document.xml", "<a/>")
        return "is a zip file but not an npz of weights: it holds 'word/document.xml'"
    if kind == "an empty zip":
        zipfile.ZipFile(path, "w").close()
        return "it is empty"
    if kind == "pickled":
        np.savez(path, **{"cls": np.array([Trap(path.parent / "sprung")], object)})
        return "'cls' is a pickled object, which is never loaded"
    if kind == "a pickle for an array":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("cls.npy", pickle.dumps(Trap(path.parent / "sprung")))
        return "'cls' cannot be read"
    if kind == "a member twice":
        with zipfile.ZipFile(path, "w") as archive, pytest.warns(UserWarning):
            for _ in range(2):
                archive.writestr("cls.npy", content)
        return "holds 'cls.npy' twice"
    if kind == "a later zip":
        needed = content.index(b"PK\x01\x02") + 6  # the version of zip that a member asks for
        path.write_bytes(content[:needed] + b"\xff" + content[needed + 1 :])
        return "is not an npz file or is truncated"
    if kind == "more than an array":
        with zipfile.ZipFile(path, "w") as archive, zipfile.ZipFile(whole) as good:
            archive.writestr("cls.npy", good.read("cls.npy") + b"more")
        return r"'cls' cannot be read .shape \[1, 1, 16\] of float32 takes 64 bytes, there are 68"
    return write_arrays(path, kind, tree)


def write_arrays(path, kind, tree):
    """Writes a file with wrong arrays; returns the expected error."""
    if kind == "NaN":
        np.savez(path, **tree | {"cls": np.full((1, 1, 16), np.nan, np.float32)})
        return "'cls' holds values that are not finite"
    if kind == "infinite":
        np.savez(path, **tree | {"cls": np.full((1, 1, 16), -np.inf, np.float32)})
        return "'cls' holds values that are not finite"
    if kind == "integers":
        np.savez(path, **tree | {"cls": np.zeros((1, 1, 16), np.int32)})
        return "'cls' has type int32"
    if kind == "two names for one":
        np.savez(path, **linen(tree), **{"Transformer/encoderblock_0/LayerNorm_2/scale": np.ones(16, np.float32)})
        return "two arrays have the name 'Transformer/encoderblock_0/LayerNorm_2/scale'"
    if kind == "positions twice":
        np.savez(path, **published(tree), pos_embedding=np.zeros((1, 1, 16), np.float32))
        return "two arrays have the name 'Transformer/posembed_input/pos_embedding'"
    if kind == "beyond float32":
        np.savez(path, **tree | {"cls": np.full((1, 1, 16), 1e300)})
        return "'cls' holds values that are not finite"
    assert kind == "a name within a name"
    np.savez(path, **tree | {"cls/kernel": tree["cls"]})
    return "'cls' is an array and has 'cls/kernel' below it"


@pytest.mark.parametrize(
    "kind",
    ["missing", "a folder", "empty", "truncated", "a page", "corrupt", "another zip", "an empty zip", "pickled",
     "a pickle for an array", "a later zip", "more than an array", "two names for one", "positions twice",
     "beyond float32", "NaN", "infinite", "integers", "a member twice", "a name within a name"],
)  # fmt: skip
def test_file_without_weights_is_one_error_line(kind, tree, tmp_path):
    path = tmp_path / "bad.npz"
    expected = write(path, kind, tree)
    with pytest.raises(CheckpointError, match=f"bad.npz.*{expected}|{expected}.*bad.npz") as error:
        read_npz(path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "sprung").exists()


def test_member_that_ends_early_is_refused(tmp_path):
    """From a header and one byte with a matching CRC, NumPy would make a whole array by repeating the byte."""
    path = tmp_path / "a.npz"
    with open(path, "wb") as file:
        np.savez(file, cls=np.ones((1, 1, 64), np.float32))
    content = bytearray(path.read_bytes())
    header = 30 + len("cls.npy") + int.from_bytes(content[28:30], "little")
    member = content[header : header + 128 + 4 * 64]
    short = member[:129]
    for signature, crc_at, compressed_at in ((b"PK\x03\x04", 14, 18), (b"PK\x01\x02", 16, 20)):
        at = content.index(signature)
        struct.pack_into("<I", content, at + crc_at, zlib.crc32(short))
        struct.pack_into("<I", content, at + compressed_at, len(short))
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="'cls' cannot be read"):
        read_npz(path)
