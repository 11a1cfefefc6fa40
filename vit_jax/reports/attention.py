"""How far the heads of a model attend. NumPy only, in float64."""

import numpy as np
from numpy.typing import ArrayLike

from vit_jax.models.intermediates import patch_grid


def distances(maps: ArrayLike, stride: int, grid: tuple[int, int] | None = None) -> np.ndarray:
    """The mean attention distance of every head in pixels, float32 [layers, heads]: figure 7, right, of the ViT paper.

    Appendix D.7 there: the distance between the query's pixel and all others, averaged with the attention weights, then over
    queries and images. The class token is left out as query and as key, and the weights of what remains sum to 1 again,
    for else what a head gives to the class token would count as looking nowhere far.

    Args:
      maps: attention weights [layers, B, heads, tokens, tokens], with a class token in front or without one.
      stride: pixels between neighbouring patches, `model.stride`.
      grid: (height, width) of the patches; None: they make a square.

    Raises ValueError where the tokens make no grid.
    """
    maps = np.asarray(maps)
    tokens = maps.shape[-1]
    first = 0 if patch_grid(tokens, grid) else 1
    found = patch_grid(tokens - first, grid)
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
