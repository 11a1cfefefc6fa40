"""How far the heads of a model attend. NumPy only, in float64."""

import numpy as np
from numpy.typing import ArrayLike

from vit_jax.models.intermediates import patch_grid


def distances(maps: ArrayLike, stride: int, grid: tuple[int, int] | None = None) -> np.ndarray:
    """Computes the mean attention distance of every head: figure 7, right, of the ViT paper.

    Appendix D.7 of the paper: the distance between the query's patch and all patches, averaged with the attention weights,
    then over queries and images. The class token is left out as query and as key, and the remaining weights are scaled to
    sum to 1; otherwise the attention to the class token would count as distance 0.

    Args:
      maps: attention weights [layers, B, heads, tokens, tokens], with a class token as the first token or without one.
      stride: pixels between neighbouring patches, `model.stride`.
      grid: (height, width) in patches; None: a square.

    Returns:
      float32 [layers, heads], in pixels.

    Raises:
      ValueError: if the tokens do not fill the grid.
    """
    maps = np.asarray(maps)
    tokens = maps.shape[-1]
    first = 0 if patch_grid(tokens, grid) else 1
    shape = patch_grid(tokens - first, grid)
    if shape is None:
        raise ValueError(
            f"{tokens} tokens are not a square of patches, with or without a class token; give grid=(height, width)"
        )
    positions = np.stack(np.divmod(np.arange(tokens - first), shape[1]), axis=-1)
    distance = stride * np.linalg.norm(positions[:, None] - positions[None], axis=-1)
    result = np.empty((maps.shape[0], maps.shape[2]), np.float32)
    for index, layer in enumerate(maps):
        weights = layer[..., first:, first:]
        total = weights.sum(axis=-1, dtype=np.float64)
        means = np.einsum("bhqk,qk->bhq", weights, distance) / np.maximum(total, np.finfo(np.float64).tiny)
        result[index] = means.mean(axis=(0, 2))
    return result
