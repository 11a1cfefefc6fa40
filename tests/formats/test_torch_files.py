"""Safetensors files of timm and Hugging Face: read exactly, checked by hashes, and written whole."""

import json

import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from vit_jax.checkpoints.load import read
from vit_jax.errors import CheckpointError
from vit_jax.formats.torch_files import read_safetensors
from vit_jax.interop.torch_models import save_huggingface, save_timm, to_timm


@pytest.mark.parametrize("name", ["plain", "features", "mean of tokens", "root", "hybrid"])
def test_timm_folder_reads_back_exactly(name, trees, assert_same, tmp_path):
    save_timm(tmp_path / "x", trees[name])
    assert_same(read_safetensors(tmp_path / "x" / "model.safetensors"), trees[name])


@pytest.mark.parametrize("name", ["plain", "features", "pre_logits"])
def test_huggingface_folder_reads_back_exactly(name, trees, assert_same, tmp_path):
    save_huggingface(tmp_path / "x", trees[name])
    assert_same(read_safetensors(tmp_path / "x" / "model.safetensors"), trees[name])


def test_bfloat16_file_rounds_once(trees, tmp_path):
    for save in (save_timm, save_huggingface):
        save(tmp_path / save.__name__, trees["plain"], dtype=ml_dtypes.bfloat16)
        found = flatten_dict(read_safetensors(tmp_path / save.__name__ / "model.safetensors"), sep="/")
        for path, leaf in flatten_dict(trees["plain"], sep="/").items():
            assert np.array_equal(found[path], leaf.astype(ml_dtypes.bfloat16).astype(np.float32)), path
    with pytest.raises(ValueError, match="float32 or bfloat16, not float64"):
        save_timm(tmp_path / "x", trees["plain"], dtype=np.float64)


def test_float16_is_read(trees, tmp_path):
    tensors = {name: array.astype(np.float16) for name, array in to_timm(trees["plain"])[0].items()}
    save_file(tensors, tmp_path / "x.safetensors")
    (tmp_path / "config.json").write_text('{"model_args": {"num_heads": 3}}')
    found = flatten_dict(read_safetensors(tmp_path / "x.safetensors"), sep="/")
    assert np.array_equal(found["head/kernel"], tensors["head.weight"].T.astype(np.float32))


def test_skipped_modules_are_not_read(trees, tmp_path):
    tensors = to_timm(trees["plain"])[0]
    tensors["head.weight"] = np.full_like(tensors["head.weight"], np.nan)
    (tmp_path / "config.json").write_text('{"num_attention_heads": 3}')
    save_file(tensors, tmp_path / "x.safetensors")
    assert "head" not in read_safetensors(tmp_path / "x.safetensors", skip=("head", "pre_logits"))
    with pytest.raises(CheckpointError, match="x.safetensors: 'head.weight' holds values that are not finite"):
        read_safetensors(tmp_path / "x.safetensors")
    save_huggingface(tmp_path / "y", trees["pre_logits"])
    assert "pre_logits" not in read_safetensors(tmp_path / "y" / "model.safetensors", skip=("head", "pre_logits"))


def heads(path) -> int:
    return read(path)[0].num_heads


def test_number_of_heads_comes_from_metadata_config_or_width(trees, tmp_path):
    tensors, path, config = to_timm(trees["plain"])[0], tmp_path / "x.safetensors", tmp_path / "config.json"
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"x.safetensors: the number of attention heads is unknown .width 24.: put the"):
        heads(path)
    config.write_text('{"num_attention_heads": 4}')  # Hugging Face's
    assert heads(path) == 4
    config.write_text('{"architecture": "vit_base_patch16_224", "model_args": {"num_heads": 6}}')  # timm's
    assert heads(path) == 6
    save_file(tensors, path, metadata={"num_heads": "3"})  # the metadata takes precedence over config.json
    assert heads(path) == 3
    for bad in ("0", "x", "-3", "1.5"):
        save_file(tensors, path, metadata={"num_heads": bad})
        with pytest.raises(CheckpointError, match=f"num_heads in its metadata is '{bad}', expected"):
            heads(path)
    save_file(tensors, path, metadata={"num_heads": "5"})
    with pytest.raises(CheckpointError, match="5 attention heads do not divide a width of 24"):
        heads(path)
    save_file(tensors, path)
    for text, expected in (
        ("{", "config.json next to it is not JSON"),
        ("[]", "config.json next to it should be a JSON object"),
        ('{"num_attention_heads": "3"}', "gives '3' attention heads"),
        ('{"num_attention_heads": true}', "gives True attention heads"),
        ('{"global_pool": "avg"}', "global_pool = 'avg', expected 'token' because the file has a class token"),
    ):
        config.write_text(text)
        with pytest.raises(CheckpointError, match=f"x.safetensors: .*{expected}"):
            heads(path)


def test_folder_appears_whole_or_not_at_all(trees, assert_same, tmp_path, monkeypatch):
    save_timm(tmp_path / "x", trees["plain"])
    with pytest.raises(FileExistsError):
        save_timm(tmp_path / "x", trees["features"])
    assert_same(read_safetensors(tmp_path / "x" / "model.safetensors"), trees["plain"])

    def fails(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", fails)
    with pytest.raises(OSError, match="No space left"):
        save_huggingface(tmp_path / "y", trees["plain"])
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_flipped_bit_in_any_tensor_is_found(trees, tmp_path):
    """Also if only some modules are read."""
    save_timm(tmp_path / "x", trees["plain"])
    path = tmp_path / "x" / "model.safetensors"
    content = path.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:begin])
    for name, entry in header.items():
        if name == "__metadata__" or name.startswith("head"):
            continue
        place = begin + entry["data_offsets"][0]
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(CheckpointError, match=f"'{name}' is damaged .its hash differs from the recorded one"):
            read_safetensors(path, skip=("head",))


def test_safetensors_library_reads_the_file(trees, tmp_path):
    save_timm(tmp_path / "x", trees["plain"])
    tensors = to_timm(trees["plain"])[0]
    found = load_file(tmp_path / "x" / "model.safetensors")
    assert found.keys() == tensors.keys() and all(np.array_equal(found[name], tensors[name]) for name in found)


@pytest.mark.parametrize(
    ("make", "expected"), [("mkdir", "is a folder"), (None, "there is no file"), ("touch", "is truncated")]
)
def test_path_without_a_file_is_an_error(make, expected, tmp_path):
    if make:
        getattr(tmp_path / "x.safetensors", make)()
    with pytest.raises(CheckpointError, match=f"{expected}.*x.safetensors|x.safetensors.*{expected}"):
        read_safetensors(tmp_path / "x.safetensors")
