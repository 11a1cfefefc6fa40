"""Conversion between Google's trees and the tensors of timm and Hugging Face, without PyTorch."""

import numpy as np
import pytest

from vit_jax.errors import CheckpointError
from vit_jax.formats import torch_names
from vit_jax.formats.torch_names import from_torch
from vit_jax.interop.torch_models import to_huggingface, to_timm
from vit_jax.models.variants import VARIANTS


@pytest.mark.parametrize("name", ["plain", "features", "mean of tokens", "root", "hybrid"])
def test_timm_round_trip_is_exact(name, trees, assert_same):
    assert_same(from_torch(to_timm(trees[name])[0], num_heads=3), trees[name])


@pytest.mark.parametrize("name", ["plain", "features", "pre_logits"])
def test_huggingface_round_trip_is_exact(name, trees, assert_same, since_five):
    tensors = to_huggingface(trees[name])[0]
    assert_same(from_torch(tensors, num_heads=3), trees[name])
    assert_same(from_torch(since_five(tensors), num_heads=3), trees[name])


def test_layouts_follow_the_definitions(trees):
    """y = W x with W (out, in); heads share one axis; query, key, value in this order."""
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


def test_heads_of_published_widths_are_known():
    for name in ("Ti/16", "S/32", "B/16", "L/16", "H/14"):
        row = VARIANTS[name]
        assert torch_names._heads(row["hidden_size"], None) == row["num_heads"]


FOREIGN = {
    "blocks.0.ls1.gamma": "layer scale",
    "reg_token": "register tokens",
    "dist_token": "distillation token",
    "fc_norm.weight": "LayerNorm after pooling",
    "norm_pre.weight": "LayerNorm before the blocks",
    "blocks.0.attn.q_norm.weight": "normalization of queries and keys",
    "attn_pool.latent": "attention pooling",
    "blocks.0.mlp.w12.weight": "gated MLP",
    "blocks.0.attn.relative_position_bias_table": "relative position embeddings",
    "visual.something": "",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_tensor_is_refused_by_name(name, trees):
    tensors = to_timm(trees["plain"])[0]
    with pytest.raises(CheckpointError, match=f"'{name}' is not part of Google's Vision Transformers.*{FOREIGN[name]}"):
        from_torch({**tensors, name: np.zeros(24, np.float32)}, num_heads=3)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"blocks.0.attn.qkv.bias": None}, "'blocks.0.attn.qkv.bias' is missing"),
        ({"pos_embed": None}, "'pos_embed' is missing"),
        ({"norm.weight": None}, "'norm.weight' is missing"),
        ({"blocks.0.attn.qkv.bias": np.zeros(71)}, r"has shape \[71\], not divisible into query, key and value"),
        ({"blocks.0.attn.qkv.weight": np.zeros((72, 24, 1))}, r"qkv.weight' has shape \[24, 24, 1\], expected 2 axes"),
        ({"blocks.0.attn.qkv.weight": np.zeros((75, 24))}, r"has shape \[25, 24\], not divisible into 3 heads"),
        ({"blocks.0.norm1.weight": np.zeros(())}, r"'blocks.0.norm1.weight' has shape \[\], expected 1 axes"),
        ({"head.weight": np.zeros((0, 24))}, r"'head.weight' has shape \[0, 24\], expected 2 axes, none of size 0"),
        ({"blocks.3.norm1.weight": np.zeros(24)}, "'blocks.3.norm1.bias' is missing"),
        ({"patch_embed.proj.weight": np.zeros((24, 3, 8, 4))}, "not a Vision Transformer: .*they must be square"),
        ({"vit.norm.weight": np.zeros(24)}, "'norm.weight' and 'vit.norm.weight' are names of the same tensor"),
        ({"classifier.weight": np.zeros((5, 24))}, "'classifier.weight' is not part of Google's Vision Transformers"),
    ],
)
def test_wrong_timm_tensor_is_one_error_line(change, expected, trees):
    tensors = {name: array for name, array in {**to_timm(trees["plain"])[0], **change}.items() if array is not None}
    with pytest.raises(CheckpointError, match=expected):
        from_torch(tensors, num_heads=3)


def test_wrong_huggingface_tensor_is_an_error(trees):
    plain, pooled = (to_huggingface(trees[name])[0] for name in ("plain", "pre_logits"))
    both = {**{f"vit.{name}": array for name, array in pooled.items()}, "classifier.weight": plain["classifier.weight"]}
    with pytest.raises(CheckpointError, match="'classifier.bias' is missing"):
        from_torch(both, num_heads=3)
    with pytest.raises(CheckpointError, match="holds a pooler and a classifier; no Hugging Face model uses both"):
        from_torch({**both, "classifier.bias": plain["classifier.bias"]}, num_heads=3)
    with pytest.raises(CheckpointError, match="not a Vision Transformer of timm or Hugging Face"):
        from_torch({"layer1.conv1.weight": np.zeros(3)})
