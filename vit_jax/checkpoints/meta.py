"""What is known of weights beside the weights: the JSON beside an npz, and what it has to say to be of use."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_jax.errors import CheckpointError


def grid_of(meta: Mapping[str, Any], stride: int, patches: int) -> tuple[int, int] | None:
    """The grid, (height, width), of that many patches of `stride` pixels: by "image_size" where that makes as many, else a
    square; None where they make none.
    """
    size = meta.get("image_size")
    height: Any
    width: Any
    height, width = size if isinstance(size, list | tuple) and len(size) == 2 else (size, size)
    whole = type(height) is type(width) is int and height % stride == width % stride == 0
    if whole and (height // stride) * (width // stride) == patches:
        return height // stride, width // stride
    side = math.isqrt(patches)
    return (side, side) if side * side == patches else None


def image_size(meta: Mapping[str, Any], stride: int, patches: int) -> tuple[int, int]:
    """Height and width of the pictures that make the patches: what `meta` says, or a square where it says nothing.

    CheckpointError where they make no square, and where they are not as many as what it says.
    """
    grid, said = grid_of(meta, stride, patches), meta.get("image_size")
    if grid is None:
        raise CheckpointError(
            f"{patches} positions make no square; the JSON beside the weights should say image_size as [height, width]"
        )
    size = (grid[0] * stride, grid[1] * stride)
    if said is not None and said != size[0] and list(np.atleast_1d(said)) != list(size):
        raise CheckpointError(
            f"the JSON beside the weights says image_size {said}, their {patches} positions are for {size[0]}×{size[1]} pixels"
        )
    return size


def class_names(meta: Mapping[str, Any], num_classes: int) -> list[str] | None:
    """The names of the classes, None where there are none; CheckpointError where they are not as many as the classes."""
    names = meta.get("class_names")
    if not names or not num_classes:
        return None
    if not isinstance(names, list | tuple):
        raise CheckpointError(f"class_names should be a list, the JSON beside the weights has {type(names).__name__}")
    if len(names) != num_classes:
        raise CheckpointError(f"the head has {num_classes} classes, the JSON beside the weights names {len(names)}")
    return [str(name) for name in names]


def statistics(meta: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the channels, of pictures in [0, 1]; Google's where `meta` says nothing."""
    found = meta.get("normalization") or {"mean": 3 * [0.5], "std": 3 * [0.5]}
    try:
        mean, std = (list(map(float, found[name])) for name in ("mean", "std"))
        if len(mean) == len(std) == 3 and np.isfinite(mean + std).all() and min(std) > 0:
            return mean, std
    except (KeyError, TypeError, ValueError):
        pass
    raise CheckpointError(
        f"normalization should hold a mean and a std of three numbers each, the JSON beside the weights has {found}"
    )
