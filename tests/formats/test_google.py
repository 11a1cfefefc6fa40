"""Google's npz files: every form is read, the published one is written, and other files are refused."""

import json

import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from vit_jax.errors import CheckpointError
from vit_jax.formats.google import form, read_meta, read_npz, save_npz

from .conftest import linen, published


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
