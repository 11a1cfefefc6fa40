"""PyTorch's safetensors: timm's and Hugging Face's names for the same arrays, read and written.

Both keep the matrices of Google's files the other way round: a linear layer is (out, in), a convolution OIHW, the heads of
attention lie side by side in one axis, and timm fuses query, key and value (timm's models/vision_transformer.py and
vision_transformer_hybrid.py; transformers' models/vit/modeling_vit.py and its conversion_mapping.py for the names before
and since version 5). Neither says in its tensors how many heads there are.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax.errors import CheckpointError
from vit_jax.models.variants import VARIANTS, from_tree

_log = logging.getLogger("vit_jax")

# Ours; timm's; Hugging Face's, in files; Hugging Face's since transformers 5, in memory and in files saved on request.
_TOP = {
    "cls": ("cls_token", "embeddings.cls_token", "embeddings.cls_token"),
    "Transformer/posembed_input/pos_embedding": ("pos_embed", *2 * ("embeddings.position_embeddings",)),
    "embedding": ("patch_embed.proj", *2 * ("embeddings.patch_embeddings.projection",)),
    "Transformer/encoder_norm": ("norm", "layernorm", "layernorm"),
    "pre_logits": (None, "pooler.dense", "pooler.dense"),
    "head": ("head", "classifier", "classifier"),
}
_ATTENTION = "MultiHeadDotProductAttention_1"
_BLOCK = {
    "LayerNorm_0": ("norm1", "layernorm_before", "layernorm_before"),
    f"{_ATTENTION}/query": ("attn.qkv", "attention.attention.query", "attention.q_proj"),
    f"{_ATTENTION}/key": ("attn.qkv", "attention.attention.key", "attention.k_proj"),
    f"{_ATTENTION}/value": ("attn.qkv", "attention.attention.value", "attention.v_proj"),
    f"{_ATTENTION}/out": ("attn.proj", "attention.output.dense", "attention.o_proj"),
    "LayerNorm_2": ("norm2", "layernorm_after", "layernorm_after"),
    "MlpBlock_3/Dense_0": ("mlp.fc1", "intermediate.dense", "mlp.fc1"),
    "MlpBlock_3/Dense_1": ("mlp.fc2", "output.dense", "mlp.fc2"),
}
_BLOCKS = ("blocks", "encoder.layer", "layers")
TIMM, HUGGINGFACE = 0, 1
_UNIT = {f"{kind}{i}": f"{long}{i}" for kind, long in (("conv", "conv"), ("gn", "norm")) for i in (1, 2, 3)}
_UNIT |= {"conv_proj": "downsample.conv", "gn_proj": "downsample.norm"}
BACKBONE = "patch_embed.backbone."
_OPTIONAL = re.compile(r"cls|head/|pre_logits/|block\d+/unit\d+/(conv|gn)_proj/")

# What other Vision Transformers have, for the sentence that refuses them.
_FOREIGN = {
    r"\bls[12]\b|layer_scale|lambda_|gamma_": "layer scale",
    r"reg(ister)?_tokens?": "register tokens",
    r"dist(illation)?_token|head_dist": "a distillation token",
    r"fc_norm": "a LayerNorm behind the pooling",
    r"norm_pre|pre_layrnorm": "a LayerNorm before the blocks",
    r"[qk]_norm": "norms of queries and keys",
    r"attn_pool": "pooling by attention",
    r"mask_token": "a token for masked patches",
    r"w12|w3\b|fc1_[gx]|gate": "a gated MLP",
    r"relative_position|rel_pos|rope": "relative positions",
    r"embeddings\.backbone|\.bit\.": "Hugging Face's hybrid, which timm's files hold as well",
}


def _leaves(module: str) -> dict[str, str]:
    """A module's leaves, ours → PyTorch's, each with the separator before it; the module itself where it is an array."""
    last = module.rsplit("/", 1)[-1]
    if last in ("cls", "pos_embedding"):
        return {"": ""}
    if re.match(r"gn|LayerNorm|encoder_norm", last):
        return {"/scale": ".weight", "/bias": ".bias"}
    return {"/kernel": ".weight"} if last.startswith("conv") else {"/kernel": ".weight", "/bias": ".bias"}


def spelling(dialect: int, blocks: Iterable[int], units: Iterable[tuple[int, int]], root: str | None) -> dict[str, str]:
    """Every path that a tree of that many parts can have → its tensor's name. Query, key and value may share one.

    `units` are (stage, unit), both from 0; `root` is what the name of a ResNet's root begins with, None without a ResNet.
    """
    modules = {ours: theirs[dialect] for ours, theirs in _TOP.items() if theirs[dialect]}
    for i in blocks:
        for ours, names in _BLOCK.items():
            modules[f"Transformer/encoderblock_{i}/{ours}"] = f"{_BLOCKS[dialect]}.{i}.{names[dialect]}"
    if root is not None:
        modules |= {"conv_root": f"{root}conv", "gn_root": f"{root}norm"}
    for stage, unit in units:
        for ours, name in _UNIT.items():
            modules[f"block{stage + 1}/unit{unit + 1}/{ours}"] = f"{BACKBONE}stages.{stage}.blocks.{unit}.{name}"
    return {ours + leaf: f"{name}{end}" for ours, name in modules.items() for leaf, end in _leaves(ours).items()}


def _torch_layout(path: str, array: np.ndarray) -> np.ndarray:
    """A leaf of ours as PyTorch lays it out."""
    if path.endswith("/kernel"):
        if array.ndim == 4:
            return array.transpose(3, 2, 0, 1)
        return array.reshape(-1, array.shape[-1]).T if "/out/" in path else array.reshape(len(array), -1).T
    return array.reshape(-1) if f"{_ATTENTION}/" in path else array


def _our_layout(path: str, array: np.ndarray, heads: int) -> np.ndarray:
    """A leaf in Google's layout from PyTorch's; ValueError says which shape it should have."""
    kernel, attention = path.endswith("/kernel"), f"{_ATTENTION}/" in path
    convolution = kernel and bool(re.match(r"(.*/)?(conv\w+|embedding)/", path))
    rank = 4 if convolution else 2 if kernel else 3 if path.endswith(("cls", "pos_embedding")) else 1
    if array.ndim != rank or 0 in array.shape:
        raise ValueError(f"has shape {list(array.shape)}, expected {rank} axes, none of them empty")
    if convolution:
        return array.transpose(2, 3, 1, 0)
    out = "/out/" in path
    if not attention or (out and not kernel):
        return array.T if kernel else array
    if array.shape[-1 if out else 0] % heads:
        raise ValueError(f"has shape {list(array.shape)}, which does not divide into {heads} heads")
    if not kernel:
        return array.reshape(heads, -1)
    return array.T.reshape(heads, -1, len(array)) if out else array.T.reshape(array.shape[1], heads, -1)


def _heads(hidden_size: int, num_heads: int | None) -> int:
    """The number of heads, from the table of variants where nobody says it."""
    known = {row["hidden_size"]: row["num_heads"] for row in VARIANTS.values()}
    heads = num_heads or known.get(hidden_size)
    if not heads:
        raise CheckpointError(
            f"nothing says how many attention heads a width of {hidden_size} has: put the config.json that belongs to the "
            "file beside it (num_attention_heads, or model_args.num_heads), or give num_heads"
        )
    if hidden_size % heads:
        raise CheckpointError(f"{heads} attention heads do not divide a width of {hidden_size}")
    return heads


def tops(module: str) -> set[str]:
    """What either calls a module at the top of our tree, such as "head"."""
    return {name for name in _TOP.get(module, ()) if name}


def _dialect(names: Iterable[str]) -> int:
    for name in names:
        for dialect, blocks in enumerate(_BLOCKS):
            if re.match(rf"{re.escape(blocks)}\.\d", name):
                return dialect
    raise CheckpointError(
        "it holds neither a timm nor a Hugging Face Vision Transformer: no tensor's name begins with blocks.0, "
        "encoder.layer.0 or layers.0"
    )


def quoted(name: str) -> str:
    """A tensor's name for a sentence, cut where a file makes it long."""
    return repr(name if len(name) <= 100 else f"{name[:100]}…")


def _foreign(name: str) -> str:
    reason = next((what for pattern, what in _FOREIGN.items() if re.search(pattern, name)), "")
    return f"{quoted(name)} belongs to no Vision Transformer of Google's" + (f", which have no {reason}" if reason else "")


def from_torch(tensors: Mapping[str, np.ndarray], num_heads: int | None = None, skip: tuple[str, ...] = ()) -> dict[str, Any]:
    """The parameter tree of timm's or Hugging Face's tensors: nested dicts of float32 NumPy arrays in Google's layouts.

    Names are timm's, hybrids among them, or Hugging Face's of any version, with or without "vit." before them. The number
    of attention heads is `num_heads`, or that of the variant of VARIANTS with the same width. Modules named in `skip`
    ("head", "pre_logits") are not asked for. Raises CheckpointError with the tensor that is missing, has another shape or
    belongs to no Vision Transformer of Google's: register tokens, layer scale, a norm behind the pooling.
    """
    named: dict[str, str] = {}  # without "vit." → as it is
    for name in tensors:
        short = name.removeprefix("vit.")
        if short in named:
            raise CheckpointError(f"{quoted(named[short])} and {quoted(name)} stand for one tensor")
        named[short] = name
    dialect = _dialect(named)
    found = [re.match(rf"{re.escape(_BLOCKS[dialect])}\.(\d{{1,4}})\.", name) for name in named]
    blocks = sorted({int(match[1]) for match in found if match})
    root, units = None, []
    if dialect == TIMM and any(name.startswith(BACKBONE) for name in named):
        root = BACKBONE if f"{BACKBONE}conv.weight" in named else f"{BACKBONE}stem."
        found = [re.match(rf"{re.escape(BACKBONE)}stages\.(\d{{1,4}})\.blocks\.(\d{{1,4}})\.", name) for name in named]
        units = sorted({(int(match[1]), int(match[2])) for match in found if match})
    expected = spelling(dialect, blocks, units, root)
    paths: dict[str, list[str]] = {}
    for path, name in expected.items():
        paths.setdefault(name, []).append(path)
    for name in named:
        if name not in paths:
            raise CheckpointError(_foreign(name))
    present = {path.rpartition("/")[0] for name in named for path in paths[name]}
    for path, name in expected.items():
        if name not in named and (path.rpartition("/")[0] in present or not _OPTIONAL.match(path)):
            raise CheckpointError(f"{quoted(name)} is missing")
    if {"classifier.weight", "pooler.dense.weight"} <= named.keys() and not skip:
        raise CheckpointError("it holds a pooler and a classifier, and no model of Hugging Face's uses both")

    heads = _heads(tensors[named[expected["Transformer/encoder_norm/scale"]]].size, num_heads)
    flat: dict[str, np.ndarray] = {}
    for short, name in named.items():
        if paths[short][0].split("/")[0] in skip:
            continue
        array = tensors[name]
        if len(paths[short]) > 1 and (not array.ndim or len(array) % len(paths[short])):
            raise CheckpointError(f"{quoted(name)} has shape {list(array.shape)}, which does not make query, key and value")
        try:
            parts = np.split(array, len(paths[short])) if len(paths[short]) > 1 else [array]
            for path, part in zip(paths[short], parts, strict=True):
                flat[path] = np.ascontiguousarray(_our_layout(path, part, heads), np.float32)
        except ValueError as error:
            raise CheckpointError(f"{quoted(name)} {error}") from None
    params = unflatten_dict(flat, sep="/")
    try:
        from_tree(params)
    except ValueError as error:
        raise CheckpointError(f"it holds no Vision Transformer: {error}") from None
    return params


def to_torch(params: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, np.ndarray]:
    """A tree's leaves under PyTorch's names and in its layouts, float32 and contiguous."""
    parts: dict[str, list[np.ndarray]] = {}
    flat = flatten_dict(dict(params), sep="/")
    if odd := flat.keys() - names.keys():
        raise CheckpointError(f"{min(odd)!r} belongs to no Vision Transformer")
    for path, name in names.items():
        if path in flat:
            parts.setdefault(name, []).append(_torch_layout(path, np.asarray(flat[path], np.float32)))
    # safetensors writes the memory as it lies: a transposed view would be another tensor in the file.
    return {name: np.ascontiguousarray(np.concatenate(p) if len(p) > 1 else p[0]) for name, p in parts.items()}
