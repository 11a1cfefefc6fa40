"""From a file to a model with its parameters, as published or made ready for fine-tuning."""

import math
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax.checkpoints.catalogue import find
from vit_jax.checkpoints.google import CheckpointError, read_meta, read_npz
from vit_jax.models.variants import from_tree, shapes
from vit_jax.models.vit import VisionTransformer


def _lerp(size: int, new: int) -> np.ndarray:
    """float64 [new, size]: linear interpolation that keeps the outermost points in place (align-corners)."""
    at = np.linspace(0, size - 1, new)
    return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(size)))


def resize_positions(
    positions: np.ndarray, grid: tuple[int, int], class_row: bool = True, old: tuple[int, int] | None = None
) -> np.ndarray:
    """Position embeddings [1, N, D] for another grid of patches, (height, width): float32 [1, N', D].

    The first row stays as it is where `class_row`. Interpolates as the original does (scipy.ndimage.zoom of order 1 in
    its vit_jax/checkpoint.py), which is linear with the corners aligned. `old` is the grid now; not given, it is square or,
    where the rows make no square, the new one. ValueError where it is neither.
    """
    head, body = positions[0, : int(class_row)], positions[0, int(class_row) :]
    side = math.isqrt(len(body))
    old = old or ((side, side) if side * side == len(body) else grid)
    if old[0] * old[1] != len(body):
        raise ValueError(f"{len(body)} positions make neither a square grid nor one of {grid[0]}×{grid[1]}")
    if tuple(old) == tuple(grid):
        return positions
    body = body.reshape(*old, -1).astype(np.float64)
    body = np.einsum("yh,xw,hwd->yxd", _lerp(old[0], grid[0]), _lerp(old[1], grid[1]), body, optimize=True)
    return np.concatenate([head, body.reshape(-1, body.shape[-1]).astype(np.float32)])[None]


def _compare(params: dict[str, Any], wanted: dict[str, Any], source: str) -> None:
    """CheckpointError unless the tree's paths and shapes are exactly those wanted."""
    found = {path: leaf.shape for path, leaf in flatten_dict(params, sep="/").items()}
    expected = {path: leaf.shape for path, leaf in flatten_dict(wanted, sep="/").items()}
    for path in sorted(found.keys() | expected.keys()):
        if path not in found:
            raise CheckpointError(f"{source}: {path} is missing")
        if path not in expected:
            raise CheckpointError(f"{source}: {path!r} belongs to no such Vision Transformer")
        if found[path] != expected[path]:
            raise CheckpointError(f"{source}: {path} should have shape {expected[path]}, has {found[path]}")


def _leaf(params: dict[str, Any], path: str) -> np.ndarray:
    node: Any = params
    for name in path.split("/"):
        node = node.get(name) if isinstance(node, dict) else None
    if not isinstance(node, np.ndarray):
        raise ValueError(f"{path} is missing")
    return node


def _grid(path: Path, stride: int, patches: int) -> tuple[int, int] | None:
    """The grid of a file's positions by the picture size in the JSON beside it, where that speaks of as many patches."""
    size = (read_meta(path) or {}).get("image_size")
    height, width = size if isinstance(size, list) and len(size) == 2 else (size, size)
    if not isinstance(height, int) or not isinstance(width, int) or (height // stride) * (width // stride) != patches:
        return None
    return height // stride, width // stride


def load(
    source: str | os.PathLike,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    *,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    dtype: Any = jnp.float32,
) -> tuple[VisionTransformer, dict[str, Any]]:
    """A model and its parameters (float32) from a file in one of Google's npz forms, or from a published name.

    The architecture is read off the file. As it stands: its own head and pre_logits. With `num_classes`, ready for
    fine-tuning: a zero head of that many classes instead, no pre_logits; 0 classes give features. With `image_size`
    (pixels, one number or height and width), positions resized to it, as the original does. The other fields are
    VisionTransformer's.

    CheckpointError for a file that is none, is damaged, lacks or adds an array, or has no head where one is asked for;
    ValueError for an image size that patches do not divide.
    """
    if num_classes is not None and num_classes < 0:
        raise ValueError(f"num_classes must not be negative, got {num_classes}")
    path = find(os.fspath(source))
    params = read_npz(path, skip=() if num_classes is None else ("head", "pre_logits"))
    try:
        model = from_tree(params)
        rows = _leaf(params, "Transformer/posembed_input/pos_embedding")
        has_class_row = model.classifier == "token"
        patches = rows.shape[1] - has_class_row if rows.ndim == 3 else 1
        # Any grid of as many patches has the same shapes.
        wanted = shapes(model, (max(1, patches) * model.stride, model.stride))
    except ValueError as error:
        raise CheckpointError(f"{path} holds no Vision Transformer: {error}") from None
    _compare(params, wanted, str(path))

    if num_classes is None and not model.num_classes:
        raise CheckpointError(f"{path} has no head; give num_classes for a fresh one, or num_classes=0 for features")
    flat = flatten_dict(params, sep="/")
    del params, wanted
    if num_classes:
        flat["head/kernel"] = np.zeros((model.hidden_size, num_classes), np.float32)
        flat["head/bias"] = np.zeros(num_classes, np.float32)
        model = model.clone(num_classes=int(num_classes))
    if image_size is not None:
        height, width = (image_size, image_size) if isinstance(image_size, int | np.integer) else image_size
        if height <= 0 or width <= 0 or height % model.stride or width % model.stride:
            raise ValueError(
                f"image_size {height}×{width} does not divide into patches: {path} wants multiples of {model.stride} pixels"
            )
        grid = (height // model.stride, width // model.stride)
        try:
            rows = resize_positions(rows, grid, has_class_row, _grid(path, model.stride, patches))
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from None
        flat["Transformer/posembed_input/pos_embedding"] = rows
    del rows
    for name in flat:  # one after the other, so that no more than one leaf is there twice
        flat[name] = jnp.asarray(flat[name])
    return model.clone(dropout=dropout, attention_dropout=attention_dropout, dtype=dtype), unflatten_dict(flat, sep="/")
