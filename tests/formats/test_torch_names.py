"""timm's and Hugging Face's safetensors: there and back to the bit, and nothing else passes for weights. Without PyTorch."""

import json
import os
import struct
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file

from vit_jax.checkpoints.load import read
from vit_jax.errors import CheckpointError
from vit_jax.formats import torch_files, torch_models, torch_names
from vit_jax.formats.torch_files import read_safetensors
from vit_jax.formats.torch_names import from_torch
from vit_jax.interop.torch_models import save_huggingface, save_timm, to_huggingface, to_timm
from vit_jax.models.variants import VARIANTS, build, shapes

TINY = dict(hidden_size=24, num_layers=2, num_heads=3, mlp_dim=40, num_classes=5)  # 24 is no width of VARIANTS
R26 = dict(resnet=(2, 2, 2, 2), patch_size=1)
MODELS = {
    "plain": (TINY, 32),
    "features": (TINY | {"num_classes": 0}, 32),
    "mean of tokens": (TINY | {"classifier": "gap"}, 32),
    "root": (TINY | {"resnet": (), "patch_size": 8}, 32),
    "hybrid": (TINY | R26, 32),
    "pre_logits": (TINY | {"representation_size": 7, "num_classes": 0}, 32),
}


def random_tree(name):
    fields, size = MODELS[name]
    draw = np.random.default_rng(0)
    flat = flatten_dict(shapes(build("B/8", **fields), size), sep="/")
    return unflatten_dict({path: draw.normal(size=leaf.shape).astype(np.float32) for path, leaf in flat.items()}, sep="/")


@pytest.fixture(scope="module")
def trees():
    return {name: random_tree(name) for name in MODELS}


def assert_same(found, expected):
    found, expected = flatten_dict(found, sep="/"), flatten_dict(expected, sep="/")
    assert found.keys() == expected.keys()
    for name, leaf in found.items():
        assert leaf.dtype == np.float32 and leaf.shape == expected[name].shape and leaf.flags.c_contiguous, name
        assert leaf.tobytes() == expected[name].tobytes(), name


@pytest.mark.parametrize("name", [name for name in MODELS if name != "pre_logits"])
def test_timm_there_and_back(name, trees, tmp_path):
    save_timm(tmp_path / "x", trees[name])
    assert_same(read_safetensors(tmp_path / "x" / "model.safetensors"), trees[name])
    assert_same(from_torch(to_timm(trees[name])[0], num_heads=3), trees[name])


@pytest.mark.parametrize("name", ["plain", "features", "pre_logits"])
def test_huggingface_there_and_back(name, trees, tmp_path):
    save_huggingface(tmp_path / "x", trees[name])
    assert_same(read_safetensors(tmp_path / "x" / "model.safetensors"), trees[name])
    tensors = to_huggingface(trees[name])[0]
    assert_same(from_torch(tensors, num_heads=3), trees[name])
    assert_same(from_torch(since_five(tensors), num_heads=3), trees[name])


def since_five(tensors):
    """The names that transformers has used in memory since version 5, and writes on request."""
    renamed = {
        "encoder.layer.": "layers.",
        "attention.attention.query": "attention.q_proj",
        "attention.attention.key": "attention.k_proj",
        "attention.attention.value": "attention.v_proj",
        "attention.output.dense": "attention.o_proj",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
    }
    result = {}
    for name, array in tensors.items():
        for old, new in renamed.items():
            name = name.replace(old, new)
        result[name] = array
    return result


def test_a_tensor_lies_where_its_peer_reads_it(trees):
    """Against the definitions: y = W x with W (out, in), heads side by side, query before key before value."""
    tree = trees["plain"]
    attention = tree["Transformer"]["encoderblock_1"]["MultiHeadDotProductAttention_1"]
    timm, hugging = to_timm(tree)[0], to_huggingface(tree)[0]
    x = np.random.default_rng(1).normal(size=24)
    for i, part in enumerate(("query", "key", "value")):
        ours = np.einsum("d,dhk->hk", x, attention[part]["kernel"]) + attention[part]["bias"]
        rows = slice(24 * i, 24 * (i + 1))
        theirs = timm["blocks.1.attn.qkv.weight"][rows] @ x + timm["blocks.1.attn.qkv.bias"][rows]
        np.testing.assert_allclose(theirs.reshape(3, 8), ours, rtol=1e-5)
        prefix = f"vit.encoder.layer.1.attention.attention.{part}"
        np.testing.assert_array_equal(hugging[f"{prefix}.weight"], timm["blocks.1.attn.qkv.weight"][rows])
    mixed = x.reshape(3, 8)
    ours = np.einsum("hk,hkd->d", mixed, attention["out"]["kernel"])
    np.testing.assert_allclose(timm["blocks.1.attn.proj.weight"] @ x, ours, rtol=1e-5)
    patch = np.random.default_rng(2).normal(size=(8, 8, 3))
    ours = np.einsum("hwc,hwcd->d", patch, tree["embedding"]["kernel"])
    theirs = np.einsum("chw,dchw->d", patch.transpose(2, 0, 1), timm["patch_embed.proj.weight"])
    np.testing.assert_allclose(theirs, ours, rtol=1e-5)


def test_bfloat16_halves_the_file_and_rounds_once(trees, tmp_path):
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


def test_where_the_number_of_heads_comes_from(trees, tmp_path):
    tensors, path, beside = to_timm(trees["plain"])[0], tmp_path / "x.safetensors", tmp_path / "config.json"
    save_file(tensors, path)
    with pytest.raises(
        CheckpointError, match="x.safetensors: nothing says how many attention heads a width of 24 has: put the"
    ):
        heads(path)
    beside.write_text('{"num_attention_heads": 4}')  # Hugging Face's
    assert heads(path) == 4
    beside.write_text('{"architecture": "vit_base_patch16_224", "model_args": {"num_heads": 6}}')  # timm's
    assert heads(path) == 6
    save_file(tensors, path, metadata={"num_heads": "3"})  # what belongs to the weights goes before what lies beside them
    assert heads(path) == 3
    for bad in ("0", "x", "-3", "1.5"):
        save_file(tensors, path, metadata={"num_heads": bad})
        with pytest.raises(CheckpointError, match=f"says that there are '{bad}' attention heads"):
            heads(path)
    save_file(tensors, path, metadata={"num_heads": "5"})
    with pytest.raises(CheckpointError, match="5 attention heads do not divide a width of 24"):
        heads(path)
    save_file(tensors, path)
    for text, said in (
        ("{", "are no JSON"),
        ("[]", "are no JSON object"),
        ('{"num_attention_heads": "3"}', "there are '3' attention heads"),
        ('{"num_attention_heads": true}', "there are True attention heads"),
        ('{"global_pool": "avg"}', "asks for 'avg' pooling .*a class token"),
    ):
        beside.write_text(text)
        with pytest.raises(CheckpointError, match=f"x.safetensors: .*{said}"):
            heads(path)


def test_the_published_widths_need_nobody_to_say_their_heads():
    for name in ("Ti/16", "S/32", "B/16", "L/16", "H/14"):
        row = VARIANTS[name]
        assert torch_names._heads(row["hidden_size"], None) == row["num_heads"]


FOREIGN = {
    "blocks.0.ls1.gamma": "layer scale",
    "reg_token": "register tokens",
    "dist_token": "a distillation token",
    "fc_norm.weight": "a LayerNorm behind the pooling",
    "norm_pre.weight": "a LayerNorm before the blocks",
    "blocks.0.attn.q_norm.weight": "norms of queries and keys",
    "attn_pool.latent": "pooling by attention",
    "blocks.0.mlp.w12.weight": "a gated MLP",
    "blocks.0.attn.relative_position_bias_table": "relative positions",
    "visual.something": "",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_no_published_vit_has_is_refused_by_name(name, trees):
    tensors = to_timm(trees["plain"])[0]
    with pytest.raises(CheckpointError, match=f"'{name}' belongs to no Vision Transformer of Google's.*{FOREIGN[name]}"):
        from_torch({**tensors, name: np.zeros(24, np.float32)}, num_heads=3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"blocks.0.attn.qkv.bias": None}, "'blocks.0.attn.qkv.bias' is missing"),
        ({"pos_embed": None}, "'pos_embed' is missing"),
        ({"norm.weight": None}, "'norm.weight' is missing"),
        ({"blocks.0.attn.qkv.bias": np.zeros(71)}, r"has shape \[71\], which does not make query, key and value"),
        ({"blocks.0.attn.qkv.weight": np.zeros((72, 24, 1))}, r"qkv.weight' has shape \[24, 24, 1\], expected 2 axes"),
        ({"blocks.0.attn.qkv.weight": np.zeros((75, 24))}, r"has shape \[25, 24\], which does not divide into 3 heads"),
        ({"blocks.0.norm1.weight": np.zeros(())}, r"'blocks.0.norm1.weight' has shape \[\], expected 1 axes"),
        ({"head.weight": np.zeros((0, 24))}, r"'head.weight' has shape \[0, 24\], expected 2 axes, none of them empty"),
        ({"blocks.3.norm1.weight": np.zeros(24)}, "'blocks.3.norm1.bias' is missing"),
        ({"patch_embed.proj.weight": np.zeros((24, 3, 8, 4))}, "holds no Vision Transformer: .*they must be square"),
        ({"vit.norm.weight": np.zeros(24)}, "'norm.weight' and 'vit.norm.weight' stand for one tensor"),
        ({"classifier.weight": np.zeros((5, 24))}, "'classifier.weight' belongs to no Vision Transformer"),
    ],
)
def test_what_is_amiss_in_timms_tensors(change, said, trees):
    tensors = {name: array for name, array in {**to_timm(trees["plain"])[0], **change}.items() if array is not None}
    with pytest.raises(CheckpointError, match=said):
        from_torch(tensors, num_heads=3)


def test_what_is_amiss_in_hugging_faces_tensors(trees):
    plain, pooled = (to_huggingface(trees[name])[0] for name in ("plain", "pre_logits"))
    both = {**{f"vit.{name}": array for name, array in pooled.items()}, "classifier.weight": plain["classifier.weight"]}
    with pytest.raises(CheckpointError, match="'classifier.bias' is missing"):
        from_torch(both, num_heads=3)
    with pytest.raises(CheckpointError, match="holds a pooler and a classifier, and no model of Hugging Face's uses both"):
        from_torch({**both, "classifier.bias": plain["classifier.bias"]}, num_heads=3)
    with pytest.raises(CheckpointError, match="neither a timm nor a Hugging Face Vision Transformer"):
        from_torch({"layer1.conv1.weight": np.zeros(3)})


def test_what_timm_has_no_model_for(trees):
    with pytest.raises(CheckpointError, match=r"timm's Vision Transformer has no pre_logits .*load\(SOURCE, num_classes=0\)"):
        to_timm(trees["pre_logits"])
    odd = flatten_dict(shapes(build("B/8", **TINY | {"resnet": (1,), "patch_size": 1}), 32), sep="/")
    odd = unflatten_dict({name: np.zeros(leaf.shape) for name, leaf in odd.items()}, sep="/")
    with pytest.raises(CheckpointError, match=r"no hybrid whose ResNet has stages of \[1\] units and 64 channels"):
        to_timm(odd)
    with pytest.raises(CheckpointError, match="'adapter/kernel' belongs to no Vision Transformer"):
        to_timm({**trees["plain"], "adapter": {"kernel": np.zeros(3)}})


def test_what_hugging_face_has_no_model_for(trees, caplog):
    with pytest.raises(CheckpointError, match="transformers 5 has no hybrid Vision Transformer"):
        to_huggingface(trees["hybrid"])
    with pytest.raises(CheckpointError, match="this model from the mean of its tokens"):
        to_huggingface(trees["mean of tokens"])
    published = {**trees["pre_logits"], "head": {"kernel": np.zeros((7, 5)), "bias": np.zeros(5)}}
    with pytest.raises(CheckpointError, match="ViTForImageClassification has no pooler, where pre_logits belong"):
        to_huggingface(published, classifier=True)
    with pytest.raises(CheckpointError, match="the model has no head"):
        to_huggingface(trees["features"], classifier=True)
    assert not caplog.records
    tensors, texts = to_huggingface(published)
    assert "the head of 5 classes stays behind" in caplog.text
    assert "pooler.dense.weight" in tensors and not any("classifier" in name for name in tensors)
    assert texts["config.json"]["architectures"] == ["ViTModel"]
    assert to_huggingface(trees["plain"], classifier=False)[1]["config.json"]["architectures"] == ["ViTModel"]


META = {
    "normalization": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]},
    "image_size": [16, 64],
    "class_names": ["a", "b", "c", "d", "é"],
}


def test_the_json_beside_the_weights_goes_along(trees, tmp_path):
    save_timm(tmp_path / "t", trees["plain"], META)
    timm = json.loads((tmp_path / "t" / "config.json").read_text(encoding="utf-8"))
    assert timm["label_names"] == META["class_names"] and timm["pretrained_cfg"]["input_size"] == [3, 16, 64]
    assert (timm["pretrained_cfg"]["mean"], timm["pretrained_cfg"]["std"]) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    save_huggingface(tmp_path / "h", trees["plain"], META)
    config, preprocessor = (
        json.loads((tmp_path / "h" / f"{name}.json").read_text(encoding="utf-8")) for name in ("config", "preprocessor_config")
    )
    assert config["image_size"] == [16, 64] and config["id2label"]["4"] == "é" and config["label2id"]["b"] == 1
    assert (preprocessor["image_mean"], preprocessor["image_std"]) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert preprocessor["size"] == {"height": 16, "width": 64} and preprocessor["resample"] == 2


def test_without_a_json_it_is_googles_scaling_and_no_names(trees):
    config, text = to_timm(trees["plain"])[1], to_huggingface(trees["plain"])[1]
    assert "label_names" not in config and config["pretrained_cfg"]["mean"] == [0.5, 0.5, 0.5]
    assert config["pretrained_cfg"]["input_size"] == [3, 32, 32]
    assert "id2label" not in text["config.json"] and text["config.json"]["num_labels"] == 5
    assert text["preprocessor_config.json"]["image_std"] == [0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("meta", "said"),
    [
        ({"class_names": ["a"]}, "the head has 5 classes, the JSON beside the weights names 1"),
        ({"image_size": 224}, "says image_size 224, their 16 positions are for 32×32 pixels"),
        ({"class_names": "abcde"}, "class_names should be a list"),
        ({"normalization": {"mean": [1, 2]}}, "should hold a mean and a std of three numbers"),
        ({"normalization": {"mean": [0, 0, 0], "std": [1, 1, 0]}}, "should hold a mean and a std of three numbers"),
    ],
)
def test_a_json_that_contradicts_the_weights(meta, said, trees, tmp_path):
    for save in (save_timm, save_huggingface):
        with pytest.raises(CheckpointError, match=said):
            save(tmp_path / "x", trees["plain"], meta)
    assert not list(tmp_path.iterdir())


def test_positions_that_make_no_square_need_a_size(trees):
    flat = flatten_dict(trees["plain"], sep="/")
    flat["Transformer/posembed_input/pos_embedding"] = np.zeros((1, 13, 24), np.float32)
    tree = unflatten_dict(flat, sep="/")
    with pytest.raises(CheckpointError, match="12 positions make no square; .* should say image_size as"):
        to_timm(tree)
    assert to_timm(tree, {"image_size": [24, 32]})[1]["model_args"]["img_size"] == [24, 32]


@pytest.mark.parametrize(("mlp_dim", "hidden_size"), [(100, 48), (41, 24), (250, 96), (4304, 1152), (5, 24)])
def test_timms_mlp_ratio_gives_the_width_back(mlp_dim, hidden_size):
    model = build("B/16", hidden_size=hidden_size, num_layers=1, num_heads=3, mlp_dim=mlp_dim)
    tree = {name: np.zeros(leaf.shape) for name, leaf in flatten_dict(shapes(model, 16), sep="/").items()}
    ratio = to_timm(unflatten_dict(tree, sep="/"))[1]["model_args"]["mlp_ratio"]
    assert int(hidden_size * ratio) == mlp_dim


def test_the_architecture_is_named_where_timm_has_it():
    for variant, name in torch_models._ARCHITECTURES.items():
        model = build(variant, num_layers=VARIANTS[variant]["num_layers"])
        tree = {path: np.broadcast_to(np.float32(0), leaf.shape) for path, leaf in flatten_dict(shapes(model), sep="/").items()}
        if model.hidden_size < 400:  # the larger ones would be copied
            assert to_timm(unflatten_dict(tree, sep="/"))[1]["architecture"] == name


def test_a_folder_is_whole_or_not_there(trees, tmp_path, monkeypatch):
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


# What follows is damaged on purpose.


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


def mutate(kind: str, content: bytes, draw) -> bytes:
    header, data = unpacked(content)
    names = [name for name in header if name != "__metadata__"]
    name = names[draw.integers(len(names))]
    other = names[draw.integers(len(names))]
    entry = header[name]
    start, end = entry["data_offsets"]
    if kind == "a byte of the header":
        return flipped(content, int(draw.integers(8, len(content) - len(data))), draw)
    if kind == "a byte of the data":
        return flipped(content, int(draw.integers(len(content) - len(data), len(content))), draw)
    if kind == "a byte of the length":
        return flipped(content, int(draw.integers(8)), draw)
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
    assert kind == "something else"
    return (b"", b"PK\x03\x04", b"<html>403 Forbidden</html>", bytes(4096), b"\x80\x04K\x01.", b"{}")[draw.integers(6)]


KINDS = [
    "a byte of the header", "a byte of the data", "a byte of the length", "renamed", "renamed to another", "two names swapped",
    "removed", "removed from the header", "doubled", "doubled in the header", "reshaped", "retyped", "retyped to size",
    "not finite", "offsets moved", "oversized length", "a bomb of a header", "truncated", "longer", "other metadata",
    "something else",
]  # fmt: skip
# Damaged files of each kind and maker; the default makes more than 700 files, 20 make 1,200.
SEEDS = int(os.environ.get("VIT_JAX_FUZZ_SEEDS", "12"))
UNMARKED = {"a byte of the data", "two names swapped", "other metadata"}  # what nobody can tell in a file without hashes


def timm_file(folder, trees):
    save_timm(folder, trees["plain"])
    return trees["plain"]


def huggingface_file(folder, trees):
    save_huggingface(folder, trees["pre_logits"])
    return trees["pre_logits"]


def others_file(folder, trees):
    """As another maker writes it: no hashes, the heads in a config.json."""
    folder.mkdir()
    save_file(since_five(to_huggingface(trees["plain"])[0]), folder / "model.safetensors")
    (folder / "config.json").write_text('{"num_attention_heads": 3}')
    return trees["plain"]


@pytest.mark.parametrize("maker", [timm_file, huggingface_file, others_file])
def test_a_damaged_file_loads_right_or_is_refused_in_a_sentence(maker, trees, tmp_path):
    expected = maker(tmp_path / "good", trees)
    content = (tmp_path / "good" / "model.safetensors").read_bytes()
    path = tmp_path / "good" / "bad.safetensors"
    draw = np.random.default_rng(sum(map(ord, maker.__name__)))

    def peak(content: bytes) -> tuple[int, str]:
        """Bytes that reading takes at most, and what is said of the file."""
        path.write_bytes(content)
        tracemalloc.start()
        try:
            found = read(path)[1]
            said = ""
        except CheckpointError as error:
            found, said = expected, str(error)
        finally:
            most = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert_same(found, expected)
        return most, said

    peak(content)  # traces the model once
    honest, said = peak(content)
    assert not said
    counts = dict.fromkeys(KINDS, 0)
    for kind in KINDS:
        if maker is others_file and kind in UNMARKED:
            continue
        for _ in range(SEEDS):
            damaged = mutate(kind, content, draw)
            most, said = peak(damaged)
            assert most < 2 * max(honest, len(damaged)), (kind, said)
            assert said.isprintable() and len(said) < 600 and (not said or "bad.safetensors" in said), said
            counts[kind] += bool(said)
    assert sum(counts.values()) > 0.8 * SEEDS * (len(KINDS) - 3), counts
    assert all(count for kind, count in counts.items() if maker is not others_file or kind not in UNMARKED), counts


def test_every_byte_of_a_small_files_data_is_watched(trees, tmp_path):
    """A flipped bit anywhere in a tensor is told, also where only some modules are read."""
    save_timm(tmp_path / "x", trees["plain"])
    path = tmp_path / "x" / "model.safetensors"
    content = path.read_bytes()
    header, _ = unpacked(content)
    begin = 8 + int.from_bytes(content[:8], "little")
    for name, entry in header.items():
        if name == "__metadata__" or name.startswith("head"):
            continue
        place = begin + entry["data_offsets"][0]
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(CheckpointError, match=f"'{name}' is not what was written: its hash is another"):
            read_safetensors(path, skip=("head",))


def test_a_stock_reader_reads_what_was_written(trees, tmp_path):
    save_timm(tmp_path / "x", trees["plain"])
    tensors = to_timm(trees["plain"])[0]
    found = load_file(tmp_path / "x" / "model.safetensors")
    assert found.keys() == tensors.keys() and all(np.array_equal(found[name], tensors[name]) for name in found)


@pytest.mark.parametrize(("make", "said"), [("mkdir", "is a folder"), (None, "there is no file"), ("touch", "is cut short")])
def test_what_is_no_file(make, said, tmp_path):
    if make:
        getattr(tmp_path / "x.safetensors", make)()
    with pytest.raises(CheckpointError, match=f"{said}.*x.safetensors|x.safetensors.*{said}"):
        read_safetensors(tmp_path / "x.safetensors")
