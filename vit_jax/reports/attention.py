"""What attention maps add up to: where the class token looks, and how far heads look. NumPy alone, in float64."""

import math

import numpy as np
from numpy.typing import ArrayLike


def _grid(patches: int, grid: tuple[int, int] | None) -> tuple[int, int] | None:
    """The grid of so many patches, (height, width): the one given or else the square; None where they make none."""
    height, width = grid or (math.isqrt(max(patches, 0)),) * 2
    return (height, width) if patches > 0 and height * width == patches else None


def rollout(maps: ArrayLike, grid: tuple[int, int] | None = None) -> np.ndarray:
    """How much of each patch reaches the class token through all layers: attention rollout, float32 [B, grid, grid].

    Abnar and Zuidema, "Quantifying Attention Flow in Transformers" (2020), section 3, as appendix D.8 of the ViT paper has it:
    the mean over heads, the identity added for the residual connection, rows normalised, layers multiplied; of the product
    the class token's row without the token itself, divided by its largest value.

    Args:
      maps: attention weights [layers, B, heads, tokens, tokens] of `vit_jax.attention_maps`, the class token first.
      grid: (height, width) of the patches; None: they make a square.

    Raises ValueError where there is no class row: the other tokens make no such grid, as in models that average all.
    """
    maps = np.asarray(maps)
    if maps.ndim != 5 or maps.shape[-1] != maps.shape[-2]:
        raise ValueError(f"attention maps are [layers, B, heads, tokens, tokens], got {list(maps.shape)}")
    found = _grid(maps.shape[-1] - 1, grid)
    if found is None:
        shape = "a square" if grid is None else f"a grid of {grid[0]}×{grid[1]}"
        raise ValueError(f"{maps.shape[-1]} tokens are no class token and {shape} of patches: rollout needs a class row")
    row = np.zeros((maps.shape[1], 1, maps.shape[-1]))
    row[..., 0] = 1
    for layer in maps[::-1]:  # from the last layer on, so that a row goes through the product and not a matrix
        mixed = layer.mean(axis=1, dtype=np.float64) + np.eye(maps.shape[-1])
        row = row @ (mixed / mixed.sum(axis=-1, keepdims=True))
    patches = row[:, 0, 1:]
    # A class token that looks at itself alone gives zeros.
    return (
        (patches / np.maximum(patches.max(axis=-1, keepdims=True), np.finfo(np.float64).tiny))
        .reshape(-1, *found)
        .astype(np.float32)
    )


def distances(maps: ArrayLike, stride: int, grid: tuple[int, int] | None = None) -> np.ndarray:
    """The mean attention distance of every head in pixels, float32 [layers, heads]: figure 7, right, of the ViT paper.

    Appendix D.7 there: the distance between the query's pixel and all others, averaged with the attention weights, then over
    queries and pictures. The class token is left out as query and as key, and the weights of what remains sum to 1 again,
    for else what a head gives to the class token would count as looking nowhere far.

    Args:
      maps: attention weights [layers, B, heads, tokens, tokens], with a class token in front or without one.
      stride: pixels between neighbouring patches, `model.stride`.
      grid: (height, width) of the patches; None: they make a square.

    Raises ValueError where the tokens make no grid.
    """
    maps = np.asarray(maps)
    tokens = maps.shape[-1]
    first = 0 if _grid(tokens, grid) else 1
    found = _grid(tokens - first, grid)
    if found is None:
        raise ValueError(f"{tokens} tokens make no grid of patches, with a class token or without; give grid=(height, width)")
    places = np.stack(np.divmod(np.arange(tokens - first), found[1]), axis=-1)
    far = stride * np.linalg.norm(places[:, None] - places[None], axis=-1)
    result = np.empty((maps.shape[0], maps.shape[2]), np.float32)
    for at, layer in enumerate(maps):
        weights = layer[..., first:, first:]
        total = weights.sum(axis=-1, dtype=np.float64)
        means = np.einsum("bhqk,qk->bhq", weights, far) / np.maximum(total, np.finfo(np.float64).tiny)
        result[at] = means.mean(axis=(0, 2))
    return result
