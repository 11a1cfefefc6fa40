"""The table of architectures, and the two ways to a model: by name, or from a tree of parameters."""

import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.models.vit import VisionTransformer

# Hidden size, layers, heads, MLP width: table 1 of the ViT paper and section 3.2 of "How to train your ViT?"; Nano, Mini and
# Midi are ours.
_SIZES = {
    "Nano": (128, 4, 4, 512),
    "Mini": (192, 6, 3, 768),
    "Midi": (384, 6, 6, 1536),
    "Ti": (192, 12, 3, 768),
    "S": (384, 12, 6, 1536),
    "B": (768, 12, 12, 3072),
    "L": (1024, 24, 16, 4096),
    "H": (1280, 32, 16, 5120),
}


def _row(size: str, patch_size: int, resnet: tuple[int, ...] | None = None) -> dict[str, Any]:
    hidden_size, num_layers, num_heads, mlp_dim = _SIZES[size]
    return dict(
        patch_size=patch_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        mlp_dim=mlp_dim,
        resnet=resnet,
    )


# A hybrid's name counts pixels a token (its patch size is on the ResNet's output), but for R+Ti/16, whose stride is 32.
VARIANTS: dict[str, dict[str, Any]] = {
    "Nano/8": _row("Nano", 8),
    "Mini/4": _row("Mini", 4),
    "Mini/8": _row("Mini", 8),
    "Midi/4": _row("Midi", 4),
    "Ti/16": _row("Ti", 16),
    "S/16": _row("S", 16),
    "S/32": _row("S", 32),
    "B/8": _row("B", 8),
    "B/16": _row("B", 16),
    "B/32": _row("B", 32),
    "L/16": _row("L", 16),
    "L/32": _row("L", 32),
    "H/14": _row("H", 14),
    "R+Ti/16": _row("Ti", 8, ()),
    "R26+S/32": _row("S", 1, (2, 2, 2, 2)),
    "R26+B/32": _row("B", 1, (2, 2, 2, 2)),
    "R50+B/16": _row("B", 1, (3, 4, 9)),
    "R50+L/32": _row("L", 1, (3, 4, 6, 3)),
}


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("vit-", ""))


def build(name: str, **fields: Any) -> VisionTransformer:
    """The model of a row of VARIANTS.

    `name` is taken in any of its spellings ("B/16", "ViT-B_16", "B_16", "R26+S/32", "R26_S_32", "R50+ViT-B_16");
    `fields` are VisionTransformer's, `num_classes` among them (default 0: no head). ValueError for an unknown name.
    """
    for known, row in VARIANTS.items():
        if _plain(known) == _plain(name):
            return VisionTransformer(**{"num_classes": 0, **row, **fields})
    raise ValueError(f"there is no variant {name!r}; there are {', '.join(VARIANTS)}")


def name_of(model: VisionTransformer) -> str | None:
    """The name of the variant with a model's sizes, with any head; None if there is none."""
    if model.resnet is not None and model.resnet_width != 64:
        return None
    return next((name for name, row in VARIANTS.items() if all(getattr(model, key) == row[key] for key in row)), None)


@functools.lru_cache
def _traced(model: VisionTransformer, image_size: tuple[int, int]) -> dict[str, Any]:
    images = jax.ShapeDtypeStruct((1, *image_size, 3), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), images)["params"]


def shapes(model: VisionTransformer, image_size: int | tuple[int, int] = 224) -> dict[str, Any]:
    """The model's parameter tree with a jax.ShapeDtypeStruct at every leaf; nothing is allocated."""
    height, width = (image_size, image_size) if isinstance(image_size, int | np.integer) else image_size
    # All blocks are alike: one is traced, which takes a tenth of the time that H/14's 32 would.
    one = _traced(model.clone(num_layers=1, parent=None), (int(height), int(width)))
    block = one["Transformer"]["encoderblock_0"]
    blocks = {f"encoderblock_{i}": dict(block) for i in range(model.num_layers)}
    return {**one, "Transformer": {**one["Transformer"], **blocks}}


def patches(model: VisionTransformer, tree: Mapping[str, Any]) -> int:
    """How many patches a model's positions are for; `tree` holds arrays or their shapes."""
    return tree["Transformer"]["posembed_input"]["pos_embedding"].shape[1] - (model.classifier == "token")


def count(model: VisionTransformer, image_size: int | tuple[int, int] = 224) -> int:
    """The number of the model's parameters; `image_size` matters, because the positions are parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(shapes(model, image_size)))


def flops(model: VisionTransformer, image_size: int | tuple[int, int] = 224) -> int:
    """Floating-point operations of one image's forward pass, a multiplication and an addition counted as two.

    Only matrix products and convolutions, by which a matrix unit is rated; elementwise operations (norms,
    softmax, GELU) is left out. A training step is three times this: its backward pass computes two products for each.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int | np.integer) else image_size
    total, channels = 0, 3
    if model.resnet is not None:
        channels = model.resnet_width
        pixels = (height // 2) * (width // 2)
        total += pixels * 7 * 7 * 3 * channels
        pixels //= 4  # the max-pool
        for stage, units in enumerate(model.resnet):
            features = model.resnet_width * 2**stage
            for unit in range(units):
                after = pixels // 4 if stage and not unit else pixels
                total += pixels * channels * features + after * (9 * features**2 + 4 * features**2)
                if channels != 4 * features or after != pixels:
                    total += after * channels * 4 * features  # conv_proj
                pixels, channels = after, 4 * features
    grid, hidden = (height // model.stride) * (width // model.stride), model.hidden_size
    total += grid * model.patch_size**2 * channels * hidden
    tokens = grid + (model.classifier == "token")
    block = tokens * (4 * hidden**2 + 2 * tokens * hidden + 2 * hidden * model.mlp_dim)
    seen = model.representation_size or hidden
    total += model.num_layers * block + hidden * model.representation_size + seen * model.num_classes
    return 2 * total


def _numbered(names: Any, prefix: str, first: int, where: str) -> int:
    """How many of `names` are prefix + number; they must count on from `first`."""
    if not isinstance(names, Mapping):
        raise ValueError(f"{where.rstrip('/')} should hold modules")
    found = sorted(int(name[len(prefix) :]) for name in names if re.fullmatch(prefix + r"\d{1,4}", name))
    for expected, number in enumerate(found, first):
        if number != expected:
            raise ValueError(f"{where}{prefix}{expected} is missing while there is {prefix}{number}")
    return len(found)


def from_tree(params: Mapping[str, Any]) -> VisionTransformer:
    """The model that a tree of parameters belongs to, all of it read off names and shapes.

    Leaves need a shape only. Raises ValueError with the path of what is missing or of the wrong rank; that every shape
    agrees with the model returned is for the caller to compare (`shapes`).
    """

    def shape(path: str, rank: int) -> tuple[int, ...]:
        node: Any = params
        for name in path.split("/"):
            if not isinstance(node, Mapping) or name not in node:
                raise ValueError(f"{path} is missing")
            node = node[name]
        found = tuple(getattr(node, "shape", ()))
        if len(found) != rank or 0 in found:
            raise ValueError(f"{path} should have {rank} axes, none of them empty, has shape {list(found)}")
        return found

    patch, width, _, hidden = shape("embedding/kernel", 4)
    if patch != width:
        raise ValueError(f"embedding/kernel makes patches of {patch}×{width} pixels, they must be square")
    if "cls" not in params:
        rows = shape("Transformer/posembed_input/pos_embedding", 3)[1]
        if math.isqrt(rows) ** 2 != rows and math.isqrt(rows - 1) ** 2 == rows - 1:
            raise ValueError(f"cls is missing while there are positions for it and {rows - 1} patches")
    num_layers = _numbered(params.get("Transformer", {}), "encoderblock_", 0, "Transformer/")
    if not num_layers:
        raise ValueError("Transformer/encoderblock_0 is missing")
    block = "Transformer/encoderblock_0"
    num_heads = shape(f"{block}/MultiHeadDotProductAttention_1/query/kernel", 3)[1]
    if hidden % num_heads:
        raise ValueError(f"{block}: {num_heads} heads do not divide {hidden} values")
    resnet, resnet_width = None, 64
    if "conv_root" in params:
        resnet_width = shape("conv_root/kernel", 4)[-1]
        if resnet_width % 32:
            raise ValueError(f"conv_root/kernel makes {resnet_width} channels, GroupNorm wants a multiple of 32")
        stages = _numbered(params, "block", 1, "")
        resnet = tuple(_numbered(params[f"block{i + 1}"], "unit", 1, f"block{i + 1}/") for i in range(stages))
    return VisionTransformer(
        num_classes=shape("head/kernel", 2)[-1] if "head" in params else 0,
        patch_size=patch,
        hidden_size=hidden,
        num_layers=num_layers,
        num_heads=num_heads,
        mlp_dim=shape(f"{block}/MlpBlock_3/Dense_0/kernel", 2)[1],
        classifier="token" if "cls" in params else "gap",
        representation_size=shape("pre_logits/kernel", 2)[-1] if "pre_logits" in params else 0,
        resnet=resnet,
        resnet_width=resnet_width,
    )
