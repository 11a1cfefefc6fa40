"""From a file to a model with its parameters, as published or made ready for fine-tuning."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax.checkpoints.catalogue import find
from vit_jax.checkpoints.google import CheckpointError, read_npz
from vit_jax.models.variants import from_tree, shapes
from vit_jax.models.vit import VisionTransformer


def _lerp(size: int, new: int) -> np.ndarray:
    """float64 [new, size]: linear interpolation that keeps the outermost points in place (align-corners)."""
    at = np.linspace(0, size - 1, new)
    return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(size)))


def _grid(tokens: int) -> tuple[int, int]:
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(f"{tokens} positions make no square grid; only square grids can be resized")
    return side, side


def resize_positions(
    positions: np.ndarray, grid: tuple[int, int], class_row: bool = True, old: tuple[int, int] | None = None
) -> np.ndarray:
    """Position embeddings [1, N, D] for another grid of patches, (height, width): float32 [1, N', D].

    The first row stays as it is where `class_row`. Interpolates as the original does (scipy.ndimage.zoom of order 1 in
    its vit_jax/checkpoint.py), which is linear with the corners aligned. `old` is the grid now, square if not given.
    ValueError where the rows make no such grid.
    """
    head, body = positions[0, : int(class_row)], positions[0, int(class_row) :]
    old = old or _grid(len(body))
    if old == tuple(grid):
        return positions
    body = body.reshape(*old, -1).astype(np.float64)
    body = np.einsum("yh,xw,hwd->yxd", _lerp(old[0], grid[0]), _lerp(old[1], grid[1]), body, optimize=True)
    return np.concatenate([head, body.reshape(-1, body.shape[-1]).astype(np.float32)])[None]


def _compare(params: dict[str, Any], model: VisionTransformer, image_size: tuple[int, int], source: str) -> None:
    """CheckpointError unless the tree's paths and shapes are exactly the model's."""
    found = {path: leaf.shape for path, leaf in flatten_dict(params, sep="/").items()}
    wanted = {path: leaf.shape for path, leaf in flatten_dict(shapes(model, image_size), sep="/").items()}
    for path in sorted(found.keys() | wanted.keys()):
        if path not in found:
            raise CheckpointError(f"{source}: {path} is missing")
        if path not in wanted:
            raise CheckpointError(f"{source}: {path} belongs to no {model.num_layers}-block Vision Transformer")
        if found[path] != wanted[path]:
            raise CheckpointError(f"{source}: {path} should have shape {wanted[path]}, has {found[path]}")


def load(
    source: str,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    **fields: Any,
) -> tuple[VisionTransformer, dict[str, Any]]:
    """A model and its parameters (float32) from a file in one of Google's npz forms, or from a published name.

    The architecture is read off the file. As it stands: its own head and pre_logits. With `num_classes`, ready for
    fine-tuning: a zero head of that many classes instead, no pre_logits; 0 classes give features. With `image_size`
    (pixels, one number or height and width), positions resized to it, as the original does. Other `fields` are
    VisionTransformer's: dropout, attention_dropout, dtype.

    CheckpointError for a file that is none, is damaged, lacks or adds an array, or has no head where one is asked for;
    ValueError for an image size that patches do not divide.
    """
    path = find(str(source))
    params = read_npz(path, skip=() if num_classes is None else ("head", "pre_logits"))
    try:
        model = from_tree(params)
        rows = params["Transformer"]["posembed_input"]["pos_embedding"]
        if getattr(rows, "ndim", 0) != 3:
            raise ValueError("Transformer/posembed_input/pos_embedding should have 3 axes")
        has_class_row = model.classifier == "token"
        trained = (rows.shape[1] - has_class_row, 1)  # any grid of as many patches has the same shapes
        _compare(params, model, (trained[0] * model.stride, model.stride), str(path))
    except (KeyError, TypeError):
        raise CheckpointError(f"{path}: Transformer/posembed_input/pos_embedding is missing") from None
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path} holds no Vision Transformer: {error}") from None

    if num_classes is None and not model.num_classes:
        raise CheckpointError(f"{path} has no head; give num_classes for a fresh one, or num_classes=0 for features")
    if num_classes:
        params["head"] = {
            "kernel": np.zeros((model.hidden_size, num_classes), np.float32),
            "bias": np.zeros(num_classes, np.float32),
        }
        model = model.clone(num_classes=num_classes)
    if image_size is not None:
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if height <= 0 or width <= 0 or height % model.stride or width % model.stride:
            raise ValueError(
                f"image_size {height}×{width} does not divide into patches: {path} wants multiples of {model.stride} pixels"
            )
        grid = (height // model.stride, width // model.stride)
        try:
            rows = resize_positions(rows, grid, has_class_row)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from None
        params["Transformer"]["posembed_input"]["pos_embedding"] = rows
    flat = {name: jnp.asarray(leaf) for name, leaf in flatten_dict(params, sep="/").items()}
    return model.clone(**fields), unflatten_dict(flat, sep="/")
