"""From a file to a model with its parameters, as published or made ready for fine-tuning."""

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax.checkpoints.download import find
from vit_jax.errors import CheckpointError, reason
from vit_jax.formats.google import read_meta, read_npz, read_shapes
from vit_jax.formats.meta import grid_of, statistics
from vit_jax.formats.stablehlo import read_about
from vit_jax.formats.torch_files import read_config, read_safetensors
from vit_jax.models.variants import from_tree, shapes
from vit_jax.models.vit import VisionTransformer

_POSITIONS = "Transformer/posembed_input/pos_embedding"


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


def _model_of(params: dict[str, Any], source: str) -> VisionTransformer:
    """The model that a tree of arrays or of their shapes belongs to; CheckpointError where one is amiss."""
    try:
        model = from_tree(params)
        rows = flatten_dict(params, sep="/").get(_POSITIONS)
        if rows is None:
            raise ValueError(f"{_POSITIONS} is missing")
        patches = rows.shape[1] - (model.classifier == "token") if len(rows.shape) == 3 else 1
        # Any grid of as many patches has the same shapes.
        wanted = shapes(model, (max(1, patches) * model.stride, model.stride))
    except ValueError as error:
        raise CheckpointError(f"{source} holds no Vision Transformer: {error}") from None
    _compare(params, wanted, source)
    return model


@contextlib.contextmanager
def reading(source: str | os.PathLike) -> Iterator[None]:
    """What the machine refuses of a path in this block (no permission, no home for its ~) becomes a CheckpointError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{getattr(error, 'filename', None) or source} cannot be read ({reason(error)})") from None


def _is_safetensors(path: Path) -> bool:
    if path.suffix == ".onnx":
        raise CheckpointError(f"{path} is a program, which is written but not read; give the weights that it was made of")
    return path.suffix == ".safetensors"


def outline(path: Path, skip: tuple[str, ...] = ()) -> tuple[VisionTransformer, dict[str, Any]]:
    """The model that a file of weights holds, and its tree of shapes; CheckpointError as `load`.

    An npz in one of Google's forms is judged by its headers, and the types are those on disk; safetensors are read.
    """
    with reading(path):
        tree = read_safetensors(path, skip) if _is_safetensors(path) else read_shapes(path, skip)
    return _model_of(tree, str(path)), tree


def read(path: Path, skip: tuple[str, ...] = ()) -> tuple[VisionTransformer, dict[str, Any]]:
    """The model that a file of weights (npz in one of Google's forms, safetensors of timm or Hugging Face) holds, and its tree
    of float32 NumPy arrays under Google's names.

    Headers are held against the model before anything is read. CheckpointError as `load`.
    """
    model, tree = outline(path, skip)
    with reading(path):
        return model, tree if _is_safetensors(path) else read_npz(path, skip)


def meta_of(path: Path) -> dict[str, Any]:
    """What lies beside a file of weights and speaks of them, in the terms of the JSON beside an npz; may be empty."""
    with reading(path):
        if path.suffix == ".stablehlo":
            return read_about(path)
        return (read_config(path) if _is_safetensors(path) else read_meta(path)) or {}


def load(
    source: str | os.PathLike,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    *,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    dtype: Any = jnp.float32,
) -> tuple[VisionTransformer, dict[str, Any]]:
    """A model and its parameters (float32) from a published name or a file: one of Google's npz forms, or safetensors.

    A run's folder stands for its final.npz, an exported folder for its safetensors; see `download.find`.

    The architecture is read off the file. As it stands: its own head and pre_logits. With `num_classes`, ready for
    fine-tuning: a zero head of that many classes instead, no pre_logits; 0 classes give features. With `image_size`
    (pixels, one number or height and width), positions resized to it, as the original does. The other fields are
    VisionTransformer's.

    CheckpointError for a file that is none, cannot be read, is damaged, lacks or adds an array, or has no head where one is
    asked for; ValueError for an image size that patches do not divide.
    """
    if num_classes is not None and num_classes < 0:
        raise ValueError(f"num_classes must not be negative, got {num_classes}")
    with reading(source):
        path = find(source, complete=num_classes is None)
    model, params = read(path, skip=() if num_classes is None else ("head", "pre_logits"))
    if num_classes is None and not model.num_classes:
        raise CheckpointError(f"{path} has no head; give num_classes for a fresh one, or num_classes=0 for features")
    flat = flatten_dict(params, sep="/")
    del params
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
        rows, has_class_row = flat[_POSITIONS], model.classifier == "token"
        try:
            old = grid_of(meta_of(path), model.stride, rows.shape[1] - has_class_row)
            flat[_POSITIONS] = resize_positions(rows, grid, has_class_row, old)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from None
    for name in flat:  # one after the other, so that no more than one leaf is there twice; on a CPU JAX takes it as it lies
        flat[name] = jax.device_put(flat[name])
    try:
        mean, deviation = statistics(meta_of(path))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    fields = dict(dropout=dropout, attention_dropout=attention_dropout, dtype=dtype)
    return model.clone(normalization=(tuple(mean), tuple(deviation)), **fields), unflatten_dict(flat, sep="/")
