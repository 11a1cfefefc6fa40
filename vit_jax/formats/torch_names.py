"""The names and layouts of timm's and Hugging Face's tensors, to and from Google's.

In PyTorch a linear layer's weight is (out, in), a convolution's is OIHW, and the attention heads share one axis; timm fuses
query, key and value. The tensors do not show the number of heads. Sources: timm's models/vision_transformer.py and
vision_transformer_hybrid.py; transformers' models/vit/modeling_vit.py, and its conversion_mapping.py for the names before
and since version 5.
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

# Google's name → timm's, Hugging Face's in files, Hugging Face's since transformers 5 (in memory; in files on request).
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

# Tensors of other Vision Transformers → what they are, for the error message.
_FOREIGN = {
    r"\bls[12]\b|layer_scale|lambda_|gamma_": "layer scale",
    r"reg(ister)?_tokens?": "register tokens",
    r"dist(illation)?_token|head_dist": "distillation token",
    r"fc_norm": "LayerNorm after pooling",
    r"norm_pre|pre_layrnorm": "LayerNorm before the blocks",
    r"[qk]_norm": "normalization of queries and keys",
    r"attn_pool": "attention pooling",
    r"mask_token": "mask token",
    r"w12|w3\b|fc1_[gx]|gate": "gated MLP",
    r"relative_position|rel_pos|rope": "relative position embeddings",
    r"embeddings\.backbone|\.bit\.": "Hugging Face's hybrid backbone (timm's files of the same models are read)",
}


def _leaves(module: str) -> dict[str, str]:
    """Returns a module's leaves, ours → PyTorch's, each with the separator before it; empty names if it is an array."""
    last = module.rsplit("/", 1)[-1]
    if last in ("cls", "pos_embedding"):
        return {"": ""}
    if re.match(r"gn|LayerNorm|encoder_norm", last):
        return {"/scale": ".weight", "/bias": ".bias"}
    return {"/kernel": ".weight"} if last.startswith("conv") else {"/kernel": ".weight", "/bias": ".bias"}


def spelling(dialect: int, blocks: Iterable[int], units: Iterable[tuple[int, int]], root: str | None) -> dict[str, str]:
    """Maps every path that a tree with these parts can have to its tensor's name; query, key and value may share one.

    Args:
      dialect: TIMM or HUGGINGFACE (or 2: Hugging Face's names in memory).
      blocks: numbers of the Transformer's blocks.
      units: (stage, unit) of the ResNet's units, both from 0.
      root: prefix of the names of the ResNet's root; None without a ResNet.
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
    """Returns a leaf in PyTorch's layout."""
    if path.endswith("/kernel"):
        if array.ndim == 4:
            return array.transpose(3, 2, 0, 1)
        return array.reshape(-1, array.shape[-1]).T if "/out/" in path else array.reshape(len(array), -1).T
    return array.reshape(-1) if f"{_ATTENTION}/" in path else array


def _our_layout(path: str, array: np.ndarray, heads: int) -> np.ndarray:
    """Returns a PyTorch array in Google's layout; raises ValueError, whose message gives the shape, if it cannot."""
    kernel, attention = path.endswith("/kernel"), f"{_ATTENTION}/" in path
    convolution = kernel and bool(re.match(r"(.*/)?(conv\w+|embedding)/", path))
    rank = 4 if convolution else 2 if kernel else 3 if path.endswith(("cls", "pos_embedding")) else 1
    if array.ndim != rank or 0 in array.shape:
        raise ValueError(f"has shape {list(array.shape)}, expected {rank} axes, none of size 0")
    if convolution:
        return array.transpose(2, 3, 1, 0)
    out = "/out/" in path
    if not attention or (out and not kernel):
        return array.T if kernel else array
    if array.shape[-1 if out else 0] % heads:
        raise ValueError(f"has shape {list(array.shape)}, not divisible into {heads} heads")
    if not kernel:
        return array.reshape(heads, -1)
    return array.T.reshape(heads, -1, len(array)) if out else array.T.reshape(array.shape[1], heads, -1)


def _heads(hidden_size: int, num_heads: int | None) -> int:
    """Returns the number of heads, from the table of variants if `num_heads` is None."""
    known = {row["hidden_size"]: row["num_heads"] for row in VARIANTS.values()}
    heads = num_heads or known.get(hidden_size)
    if not heads:
        raise CheckpointError(
            f"the number of attention heads is unknown (width {hidden_size}): put the config.json that belongs to the file "
            "next to it (num_attention_heads or model_args.num_heads), or give num_heads"
        )
    if hidden_size % heads:
        raise CheckpointError(f"{heads} attention heads do not divide a width of {hidden_size}")
    return heads


def torch_module_names(module: str) -> set[str]:
    """Returns the names that timm and Hugging Face have for a module at the top of our tree, such as "head"."""
    return {name for name in _TOP.get(module, ()) if name}


def _dialect(names: Iterable[str]) -> int:
    for name in names:
        for dialect, blocks in enumerate(_BLOCKS):
            if re.match(rf"{re.escape(blocks)}\.\d", name):
                return dialect
    raise CheckpointError(
        "not a Vision Transformer of timm or Hugging Face: no tensor's name begins with blocks.0, encoder.layer.0 or layers.0"
    )


def short_repr(name: str) -> str:
    """Returns a tensor's name in quotes, cut after 100 characters."""
    return repr(name if len(name) <= 100 else f"{name[:100]}…")


def _foreign(name: str) -> str:
    part = next((what for pattern, what in _FOREIGN.items() if re.search(pattern, name)), "")
    return f"{short_repr(name)} is not part of Google's Vision Transformers" + (f", which have no {part}" if part else "")


def _without_prefix(names: Iterable[str]) -> dict[str, str]:
    """Each name without the prefix "vit." → the name as it is; CheckpointError if two names become one."""
    named: dict[str, str] = {}
    for name in names:
        short = name.removeprefix("vit.")
        if short in named:
            raise CheckpointError(f"{short_repr(named[short])} and {short_repr(name)} are names of the same tensor")
        named[short] = name
    return named


def from_torch(tensors: Mapping[str, np.ndarray], num_heads: int | None = None, skip: tuple[str, ...] = ()) -> dict[str, Any]:
    """Converts timm's or Hugging Face's tensors to a parameter tree.

    Args:
      tensors: under timm's names, hybrids included, or Hugging Face's of any version, with or without the prefix "vit.".
      num_heads: attention heads; None: those of the variant of VARIANTS with the same width.
      skip: names of modules ("head", "pre_logits") whose tensors are not accessed.

    Returns:
      Nested dicts of float32 NumPy arrays in Google's layouts.

    Raises:
      CheckpointError: if a tensor is missing, has a wrong shape or is not part of Google's models, such as register tokens,
        layer scale or a norm after pooling; the message names the tensor.
    """
    named = _without_prefix(tensors)
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
            raise CheckpointError(f"{short_repr(name)} is missing")
    if {"classifier.weight", "pooler.dense.weight"} <= named.keys() and not skip:
        raise CheckpointError("it holds a pooler and a classifier; no Hugging Face model uses both")

    heads = _heads(tensors[named[expected["Transformer/encoder_norm/scale"]]].size, num_heads)
    flat: dict[str, np.ndarray] = {}
    for short, name in named.items():
        if paths[short][0].split("/")[0] in skip:
            continue
        array = tensors[name]
        if len(paths[short]) > 1 and (not array.ndim or len(array) % len(paths[short])):
            raise CheckpointError(f"{short_repr(name)} has shape {list(array.shape)}, not divisible into query, key and value")
        try:
            parts = np.split(array, len(paths[short])) if len(paths[short]) > 1 else [array]
            for path, part in zip(paths[short], parts, strict=True):
                flat[path] = np.ascontiguousarray(_our_layout(path, part, heads), np.float32)
        except ValueError as error:
            raise CheckpointError(f"{short_repr(name)} {error}") from None
    params = unflatten_dict(flat, sep="/")
    try:
        from_tree(params)
    except ValueError as error:
        raise CheckpointError(f"not a Vision Transformer: {error}") from None
    return params


def to_torch(params: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Converts a tree's leaves to PyTorch's layouts.

    Args:
      params: nested dicts of arrays.
      names: from `spelling`.

    Returns:
      PyTorch's name → contiguous float32 array.

    Raises:
      CheckpointError: if a leaf has no name in PyTorch.
    """
    parts: dict[str, list[np.ndarray]] = {}
    flat = flatten_dict(dict(params), sep="/")
    if unknown := flat.keys() - names.keys():
        raise CheckpointError(f"{min(unknown)!r} is not part of a Vision Transformer")
    for path, name in names.items():
        if path in flat:
            parts.setdefault(name, []).append(_torch_layout(path, np.asarray(flat[path], np.float32)))
    # safetensors writes the memory of an array, so a transposed view would be stored as another tensor.
    return {name: np.ascontiguousarray(np.concatenate(p) if len(p) > 1 else p[0]) for name, p in parts.items()}
