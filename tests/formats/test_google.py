"""Google's npz files: every form is read, the published one is written, and other files are refused."""

import json
import pickle
import struct
import zipfile
import zlib

import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from vit_jax.errors import CheckpointError
from vit_jax.formats.google import form, read_meta, read_npz, save_npz
from vit_jax.models.variants import build, shapes


@pytest.fixture(scope="module")
def tree():
    """A small hybrid with pre_logits, every leaf random, under the published names."""
    model = build(
        "R26+S/32", hidden_size=16, num_layers=2, num_heads=2, mlp_dim=32, resnet=(1,), resnet_width=32,
        num_classes=3, representation_size=8,
    )  # fmt: skip
    draw = np.random.default_rng(0)
    flat = flatten_dict(shapes(model, 16), sep="/")
    return {name: draw.normal(size=leaf.shape).astype(np.float32) for name, leaf in flat.items()}


def rename(name: str) -> str:
    for published, linen in (
        ("MultiHeadDotProductAttention_1", "MultiHeadDotProductAttention_0"),
        ("LayerNorm_2", "LayerNorm_1"),
        ("MlpBlock_3", "MlpBlock_0"),
    ):
        name = name.replace(published, linen)
    return name


def published(tree):
    return {name: leaf.reshape(1, 1, 1, -1) if "/gn" in f"/{name}" else leaf for name, leaf in tree.items()}


def linen(tree):
    return {rename(name): leaf for name, leaf in tree.items()}


def scan_stacked(tree):
    stacked = {name: leaf for name, leaf in linen(tree).items() if "encoderblock_" not in name}
    for name in (name for name in linen(tree) if "encoderblock_0" in name):
        layers = [linen(tree)[name.replace("_0/", f"_{i}/", 1)] for i in range(2)]
        stacked[name.replace("encoderblock_0", "encoderblock")] = np.stack(layers)
    return stacked


def folded(tree):
    """big_vision's form: positions at the top without the class token's row, which `cls` contains."""
    flat = linen(tree)
    positions = flat.pop("Transformer/posembed_input/pos_embedding")
    return flat | {"pos_embedding": positions[:, 1:], "cls": flat["cls"] + positions[:, :1]}


def under(prefix, flat):
    return {prefix + name: leaf for name, leaf in flat.items()}


FORMS = {
    "published": published,
    "linen": linen,
    "opt/target/published": lambda tree: under("opt/target/", published(tree)) | {"opt/state/step": np.int32(7)},
    "opt/target/linen": lambda tree: under("opt/target/", linen(tree)) | {"opt/state/step": np.int32(7)},
    "params/linen": lambda tree: under("params/", folded(tree)),
    "params/published": lambda tree: under("params/", published(tree)),
    "params/img/linen": lambda tree: under("params/img/", folded(tree)) | {"params/t": np.zeros(1, np.float32)},
    "params/scan-stacked": lambda tree: under("params/", scan_stacked(tree)),
    "scan-stacked": scan_stacked,
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_reads_as_the_published_tree(name, tree, tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, **FORMS[name](tree))
    assert form(path) == name
    found = flatten_dict(read_npz(path), sep="/")
    assert found.keys() == tree.keys()
    for key, leaf in found.items():
        if "pos_embedding" in key and name in ("params/linen", "params/img/linen"):
            assert not leaf[:, :1].any()
            leaf, expected = leaf[:, 1:], tree[key][:, 1:]
        elif key == "cls" and name in ("params/linen", "params/img/linen"):
            expected = tree["cls"] + tree["Transformer/posembed_input/pos_embedding"][:, :1]
        else:
            expected = tree[key]
        assert leaf.dtype == np.float32 and np.array_equal(leaf, expected), key


def test_bfloat16_stored_as_void_is_read(tree, tmp_path):
    np.savez(tmp_path / "x.npz", **{name: leaf.astype(ml_dtypes.bfloat16) for name, leaf in tree.items()})
    with np.load(tmp_path / "x.npz") as stored:
        assert stored["cls"].dtype == np.dtype("V2")
    for name, leaf in flatten_dict(read_npz(tmp_path / "x.npz"), sep="/").items():
        assert np.array_equal(leaf, tree[name].astype(ml_dtypes.bfloat16).astype(np.float32))


@pytest.mark.parametrize("folder", ["tiny-augreg", "tiny-i21k", "tiny-rstem-i21k", "tiny-r3-augreg"])
def test_round_trip_gives_the_same_arrays(folder, shared, tmp_path):
    source = shared / "oracles" / folder / "ckpt.npz"
    save_npz(tmp_path / "x.npz", read_npz(source))
    with np.load(source) as before, np.load(tmp_path / "x.npz") as after:
        assert sorted(before.files) == sorted(after.files)
        for name in before.files:
            assert (before[name].shape, before[name].dtype) == (after[name].shape, after[name].dtype)
            assert before[name].tobytes() == after[name].tobytes()


def test_skipped_modules_are_not_read(tree, tmp_path):
    broken = published(tree) | {"head/kernel": np.full((8, 3), np.nan, np.float32)}
    np.savez(tmp_path / "x.npz", **broken)
    assert "head" not in read_npz(tmp_path / "x.npz", skip=("head",))
    with pytest.raises(CheckpointError, match="'head/kernel' holds values that are not finite"):
        read_npz(tmp_path / "x.npz")


def test_embedded_checkpoint_is_the_trained_one_in_bfloat16(shared):
    from vit_jax.checkpoints.download import find

    trained = flatten_dict(read_npz(shared / "checkpoints" / "mini_8.npz"), sep="/")
    shipped = flatten_dict(read_npz(find("mini_8")), sep="/")
    assert trained.keys() == shipped.keys()
    for name, leaf in trained.items():
        assert np.array_equal(shipped[name], leaf.astype(ml_dtypes.bfloat16).astype(np.float32)), name


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


@pytest.mark.parametrize("meta", [{"step": 2}, None])
def test_failed_write_keeps_the_earlier_files(tree, tmp_path, monkeypatch, meta):
    path = tmp_path / "x.npz"
    save_npz(path, {"cls": np.zeros(3, np.float32)}, {"step": 1})
    before = path.read_bytes()

    def fails(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", fails)
    with pytest.raises(OSError, match="No space left"):
        save_npz(path, {"cls": np.ones(3, np.float32)}, meta)
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_npz(path, {"cls": np.ones(3, np.float32)}, {"step": np.float32(2)})
    assert path.read_bytes() == before and read_meta(path) == {"step": 1}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.json", "x.npz"]


def test_meta_is_stored_next_to_the_weights(tmp_path):
    path = tmp_path / "x.npz"
    assert read_meta(path) is None
    save_npz(path, {"cls": np.zeros(3)}, {"class_names": ["a", "b"], "image_size": 32})
    assert read_meta(path) == {"class_names": ["a", "b"], "image_size": 32}
    save_npz(path, {"cls": np.zeros(3)})  # weights without a description
    assert read_meta(path) is None
    path.with_suffix(".json").write_text("{")
    with pytest.raises(CheckpointError, match="x.json is not JSON"):
        read_meta(path)
    for text in ("[1, 2]", '"x"', "5", "true", "null"):
        path.with_suffix(".json").write_text(text)
        with pytest.raises(CheckpointError, match="x.json should hold an object"):
            read_meta(path)


def test_bfloat16_is_written_on_request(tree, tmp_path):
    save_npz(tmp_path / "x.npz", {"cls": tree["cls"]}, dtype=ml_dtypes.bfloat16)
    expected = tree["cls"].astype(ml_dtypes.bfloat16).astype(np.float32)
    assert np.array_equal(read_npz(tmp_path / "x.npz")["cls"], expected)
    assert json.dumps(form(tmp_path / "x.npz")) == '"published"'


def test_positions_of_big_vision_before_2022_are_read(tree, tmp_path):
    flat = dict(tree)
    flat["Transformer/pos_embedding"] = flat.pop("Transformer/posembed_input/pos_embedding")
    np.savez(tmp_path / "x.npz", **flat)
    found = flatten_dict(read_npz(tmp_path / "x.npz"), sep="/")
    assert all(np.array_equal(leaf, tree[name]) for name, leaf in found.items()) and found.keys() == tree.keys()


def test_bytes_before_the_zip_are_ignored(tree, tmp_path):
    np.savez(tmp_path / "x.npz", **tree)
    (tmp_path / "x.npz").write_bytes(b"\x80\x04junk" + (tmp_path / "x.npz").read_bytes())
    assert np.array_equal(read_npz(tmp_path / "x.npz")["cls"], tree["cls"])


def test_reserved_json_is_never_replaced(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for meta in (None, {"step": 1}):
        with pytest.raises(CheckpointError, match="config.npz: its description would be config.json, a reserved name"):
            save_npz(tmp_path / "config.npz", {"cls": np.zeros(3)}, meta)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    with pytest.raises(ValueError, match="config.json: the file name must end in .npz"):
        save_npz(tmp_path / "config.json", {"cls": np.zeros(3)}, {})


def test_reading_is_safe_with_several_threads(tree, tmp_path):
    """Threads that share one zipfile.ZipFile get wrong bytes on Python 3.12 and newer in most reads of such a small file."""
    path = tmp_path / "a.npz"
    save_npz(path, tree)
    expected = flatten_dict(tree, sep="/")
    for _ in range(50):
        found = flatten_dict(read_npz(path), sep="/")
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[name], expected[name]) for name in expected)


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
