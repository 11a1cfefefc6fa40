"""Loads a model and its parameters from a file, as published or prepared for fine-tuning."""

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

from vit_jax.checkpoints.catalogue import resolve
from vit_jax.checkpoints.download import find
from vit_jax.errors import CheckpointError, reason
from vit_jax.files import expand_user
from vit_jax.formats.google import POSITIONS, read_meta, read_npz, read_shapes
from vit_jax.formats.meta import eval_crop, grid_of, image_size, statistics
from vit_jax.formats.stablehlo import read_about
from vit_jax.formats.torch_files import read_config, read_safetensors
from vit_jax.models.variants import build, from_tree, patches, shapes
from vit_jax.models.vit import VisionTransformer


def _interpolation(size: int, new: int) -> np.ndarray:
    """Returns the float64 matrix [new, size] of a linear interpolation with aligned corners."""
    at = np.linspace(0, size - 1, new)
    return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(size)))


def resize_positions(
    positions: np.ndarray, grid: tuple[int, int], class_row: bool = True, old: tuple[int, int] | None = None
) -> np.ndarray:
    """Resizes position embeddings to another grid of patches.

    The interpolation is linear with aligned corners, as in the original (scipy.ndimage.zoom of order 1 in its
    vit_jax/checkpoint.py).

    Args:
      positions: [1, N, D].
      grid: the new (height, width) in patches.
      class_row: whether the first row belongs to the class token; it is not changed.
      old: the present grid; None: a square, or `grid` if the rows do not form a square.

    Returns:
      float32 [1, N', D].

    Raises:
      ValueError: if the rows do not form the present grid.
    """
    head, body = positions[0, : int(class_row)], positions[0, int(class_row) :]
    side = math.isqrt(len(body))
    old = old or ((side, side) if side * side == len(body) else grid)
    if old[0] * old[1] != len(body):
        raise ValueError(f"{len(body)} positions form neither a square grid nor one of {grid[0]}×{grid[1]}")
    if tuple(old) == tuple(grid):
        return positions
    body = body.reshape(*old, -1).astype(np.float64)
    body = np.einsum("yh,xw,hwd->yxd", _interpolation(old[0], grid[0]), _interpolation(old[1], grid[1]), body, optimize=True)
    return np.concatenate([head, body.reshape(-1, body.shape[-1]).astype(np.float32)])[None]


def _compare(params: dict[str, Any], wanted: dict[str, Any], source: str) -> None:
    """Raises CheckpointError unless the tree's paths and shapes are exactly the expected ones."""
    found = {path: leaf.shape for path, leaf in flatten_dict(params, sep="/").items()}
    expected = {path: leaf.shape for path, leaf in flatten_dict(wanted, sep="/").items()}
    for path in sorted(found.keys() | expected.keys()):
        if path not in found:
            raise CheckpointError(f"{source}: {path} is missing")
        if path not in expected:
            raise CheckpointError(f"{source}: {path!r} is not part of such a Vision Transformer")
        if found[path] != expected[path]:
            raise CheckpointError(f"{source}: {path} should have shape {expected[path]}, has {found[path]}")


def _model_of_tree(params: dict[str, Any], source: str) -> VisionTransformer:
    """Returns the model of a tree of arrays or shapes; raises CheckpointError if a leaf is wrong or missing."""
    try:
        model = from_tree(params)
        rows = flatten_dict(params, sep="/").get(POSITIONS)
        if rows is None:
            raise ValueError(f"{POSITIONS} is missing")
        patches = rows.shape[1] - (model.classifier == "token") if len(rows.shape) == 3 else 1
        # Every grid of this number of patches has the same shapes.
        wanted = shapes(model, (max(1, patches) * model.stride, model.stride))
    except ValueError as error:
        raise CheckpointError(f"{source} is not a Vision Transformer: {error}") from None
    _compare(params, wanted, source)
    return model


@contextlib.contextmanager
def as_checkpoint_error(source: str | os.PathLike) -> Iterator[None]:
    """Turns errors of the system in this block, such as a missing permission, into a CheckpointError that names the file."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{getattr(error, 'filename', None) or source} cannot be read ({reason(error)})") from None


def _is_safetensors(path: Path) -> bool:
    if path.suffix == ".onnx":
        raise CheckpointError(f"{path}: ONNX files can be exported, not loaded; give the weights that it was exported from")
    return path.suffix == ".safetensors"


def model_of_file(path: Path, skip: tuple[str, ...] = ()) -> tuple[VisionTransformer, dict[str, Any]]:
    """Returns the model of a file of weights, and the tree of its leaves' shapes and types.

    Of an npz only the headers are read, and the types are those on disk; safetensors are read completely.

    Raises:
      CheckpointError: as `load`.
    """
    with as_checkpoint_error(path):
        tree = read_safetensors(path, skip) if _is_safetensors(path) else read_shapes(path, skip)
    return _model_of_tree(tree, str(path)), tree


def read(path: Path, skip: tuple[str, ...] = ()) -> tuple[VisionTransformer, dict[str, Any]]:
    """Reads a file of weights: npz in one of Google's forms, or safetensors of timm or Hugging Face.

    Returns:
      The model, and its tree of float32 NumPy arrays under Google's names.

    Raises:
      CheckpointError: as `load`; wrong headers are found before any values are read.
    """
    model, tree = model_of_file(path, skip)
    with as_checkpoint_error(path):
        return model, tree if _is_safetensors(path) else read_npz(path, skip)


def architecture(source: str) -> tuple[VisionTransformer, int]:
    """The model, and the height of its images in pixels, of a published name, which is not downloaded, or of a file.

    Raises:
      CheckpointError: if the name is unknown or the file cannot be read.
    """
    if not expand_user(source, "model.checkpoint").exists():
        row = resolve(source)
        return build(row.variant, num_classes=row.num_classes), row.image_size
    path = find(source)
    model, tree = model_of_file(path)
    return model, image_size(meta_of(path), model.stride, patches(model, tree))[0]


def meta_of(path: Path) -> dict[str, Any]:
    """Returns the description of a file of weights as the fields of the JSON next to an npz; empty if there is none.

    Raises:
      CheckpointError: if the description cannot be read or used.
    """
    with as_checkpoint_error(path):
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
    """Loads a model and its parameters; the architecture is read from the file.

    Args:
      source: a published name; an npz in one of Google's forms; safetensors of timm or Hugging Face; or a folder with one of
        them (see `download.find`).
      num_classes: None keeps the file's head and pre_logits. A number replaces both for fine-tuning by a zero head of that
        many classes; 0 gives features without a head.
      image_size: pixels, one number or (height, width), to which the positions are resized as the original does it; None
        keeps them.
      dropout, attention_dropout, dtype: fields of the VisionTransformer.

    Returns:
      The model, which knows how its images are prepared, and its float32 JAX arrays.

    Raises:
      CheckpointError: if the file cannot be found, read or used, has a missing or an unknown array, or has no head and
        `num_classes` is None.
      ValueError: if the image size is not divisible into patches, or `num_classes` is negative.
    """
    if num_classes is not None and num_classes < 0:
        raise ValueError(f"num_classes must not be negative, got {num_classes}")
    with as_checkpoint_error(source):
        path = find(source, complete=num_classes is None)
    model, params = read(path, skip=() if num_classes is None else ("head", "pre_logits"))
    if num_classes is None and not model.num_classes:
        raise CheckpointError(f"{path} has no head; give num_classes for a new one, or num_classes=0 for features")
    flat = flatten_dict(params, sep="/")
    del params
    if num_classes:
        flat["head/kernel"] = np.zeros((model.hidden_size, num_classes), np.float32)
        flat["head/bias"] = np.zeros(num_classes, np.float32)
        model = model.clone(num_classes=int(num_classes))
    if image_size is not None:
        size = (image_size, image_size) if isinstance(image_size, int | np.integer) else image_size
        flat[POSITIONS] = _resized(flat[POSITIONS], model, size, path)
    for name in flat:  # one by one, so that at most one leaf is in memory twice; on a CPU JAX does not copy aligned arrays
        flat[name] = jax.device_put(flat[name])
    try:
        meta = meta_of(path)
        (mean, std), crop = statistics(meta), eval_crop(meta)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    fields = dict(dropout=dropout, attention_dropout=attention_dropout, dtype=dtype)
    return model.clone(normalization=(tuple(mean), tuple(std)), eval_crop=crop, **fields), unflatten_dict(flat, sep="/")


def _resized(positions: np.ndarray, model: VisionTransformer, size: tuple[int, int], path: Path) -> np.ndarray:
    """Returns the positions of a file for images of another (height, width)."""
    height, width = size
    if height <= 0 or width <= 0 or height % model.stride or width % model.stride:
        raise ValueError(
            f"image_size {height}×{width} is not divisible into patches: {path} needs multiples of {model.stride} pixels"
        )
    class_row = model.classifier == "token"
    try:
        old = grid_of(meta_of(path), model.stride, positions.shape[1] - class_row)
        return resize_positions(positions, (height // model.stride, width // model.stride), class_row, old)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
