"""Features, attention maps and the outputs of all stages of a model, read without a change of the model."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from vit_jax.models.vit import VisionTransformer

_ATTENTION = "MultiHeadDotProductAttention_1"


def features(model: VisionTransformer, params: dict[str, Any], images) -> jax.Array:
    """What the head sees, float32 [B, hidden_size] (after pre_logits, if the model has them); images as the model's."""
    return model.clone(num_classes=0).apply({"params": params}, images)  # type: ignore[return-value]


def _captured(model: VisionTransformer, params: dict[str, Any], images) -> tuple[jax.Array, dict[str, Any]]:
    wanted = ("embedding", "pre_logits", "encoder_norm")
    logits, state = model.apply(
        {"params": params},
        images,
        mutable=["intermediates"],
        capture_intermediates=lambda module, _: (module.name or "").startswith(("encoderblock_", *wanted)),
    )
    return logits, state["intermediates"]


def attention_maps(model: VisionTransformer, params: dict[str, Any], images) -> jax.Array:
    """The attention weights of every layer, [layers, B, heads, tokens, tokens]; each row sums to 1."""
    _, found = _captured(model, params, images)
    blocks = (found["Transformer"][f"encoderblock_{i}"] for i in range(model.num_layers))
    return jnp.stack([block[_ATTENTION]["attention_weights"][0] for block in blocks])


def patch_grid(patches: int, grid: tuple[int, int] | None) -> tuple[int, int] | None:
    """The grid (height, width) of a number of patches: `grid` if it is given, else a square; None if they do not fill it."""
    height, width = grid or (math.isqrt(max(patches, 0)),) * 2
    return (height, width) if patches > 0 and height * width == patches else None


def attention_rollout(maps: ArrayLike, grid: tuple[int, int] | None = None) -> np.ndarray:
    """Attention rollout: how much of each patch reaches the class token through all layers, float32 [B, grid, grid].

    Abnar and Zuidema, "Quantifying Attention Flow in Transformers" (2020), section 3, as appendix D.8 of the ViT paper has it:
    the mean over heads, the identity added for the residual connection, rows normalised, layers multiplied; of the product
    the class token's row without the token itself, divided by its largest value.

    Args:
      maps: attention weights [layers, B, heads, tokens, tokens] of `vit_jax.attention_maps`, the class token first.
      grid: (height, width) of the patches; None: they make a square.

    Raises:
      ValueError: if the maps have another shape, or there is no class row because the other tokens do not fill the grid, as in
        models that average all tokens.
    """
    maps = np.asarray(maps)
    if maps.ndim != 5 or maps.shape[-1] != maps.shape[-2]:
        raise ValueError(f"attention maps are [layers, B, heads, tokens, tokens], got {list(maps.shape)}")
    found = patch_grid(maps.shape[-1] - 1, grid)
    if found is None:
        shape = "a square" if grid is None else f"a grid of {grid[0]}×{grid[1]}"
        raise ValueError(f"{maps.shape[-1]} tokens are no class token and {shape} of patches: rollout needs a class row")
    row = np.zeros((maps.shape[1], 1, maps.shape[-1]))
    row[..., 0] = 1
    for layer in maps[::-1]:  # from the last layer on, so that a row goes through the product and not a matrix
        mixed = layer.mean(axis=1, dtype=np.float64) + np.eye(maps.shape[-1])
        row = row @ (mixed / mixed.sum(axis=-1, keepdims=True))
    patches = row[:, 0, 1:]
    # A class token that attends only to itself gives zeros.
    return (
        (patches / np.maximum(patches.max(axis=-1, keepdims=True), np.finfo(np.float64).tiny))
        .reshape(-1, *found)
        .astype(np.float32)
    )


def stages(model: VisionTransformer, params: dict[str, Any], images) -> dict[str, jax.Array]:
    """The outputs of a model's parts in order, to find where two implementations diverge.

    "embedding" [B, h, w, D]; "block_0" … [B, T, D]; "features" [B, D], after the last LayerNorm and pooling;
    "pre_logits" [B, R] if the model has them; "logits" [B, classes] if it has a head.
    """
    logits, found = _captured(model, params, images)
    encoder = found["Transformer"]
    result = {"embedding": found["embedding"]["__call__"][0]}
    for i in range(model.num_layers):
        result[f"block_{i}"] = encoder[f"encoderblock_{i}"]["__call__"][0]
    tokens = encoder["encoder_norm"]["__call__"][0]
    result["features"] = tokens[:, 0] if model.classifier == "token" else jnp.mean(tokens, axis=1)
    if model.representation_size:
        result["pre_logits"] = jnp.tanh(found["pre_logits"]["__call__"][0])
    if model.num_classes:
        result["logits"] = logits
    return result
