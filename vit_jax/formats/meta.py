"""What is known of weights beside the weights: the JSON beside an npz, and what it has to say to be of use."""

import json
import math
import numbers
from collections.abc import Mapping
from typing import Any

from vit_jax.errors import CheckpointError, printable, reason

# Of images in [0, 1]; whatever is scaled by numbers within these bounds fits into float32.
_LARGEST_STATISTIC, _SMALLEST_STD = 1e4, 1e-4
_DEEPEST = 20  # levels of nesting
# Fields that only the JSON of weights has, all of them at its top level.
_OF_WEIGHTS = {"image_size", "normalization", "class_names", "source_sha256", "copy_of", "lacks", "accuracy", "step"}


def _is_deeper(value: Any, levels: int) -> bool:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels < 0 or any(_is_deeper(child, levels - 1) for child in children)


def parse(text: str | bytes, source: object) -> dict[str, Any]:
    """The JSON object that describes weights; raises CheckpointError, which begins with `source`, for anything else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError, MemoryError) as error:
        raise CheckpointError(f"{source} is not JSON: {reason(error)}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{source} should hold an object, which describes the weights, holds {printable(found, 40)!r}")
    if _is_deeper(found, _DEEPEST):
        raise CheckpointError(f"{source} is nested in more than {_DEEPEST} levels, which no description of weights is")
    lacks = found.get("lacks")
    if lacks is not None and not (isinstance(lacks, list) and all(isinstance(name, str) for name in lacks)):
        raise CheckpointError(f"{source}: lacks should be a list of names, is {printable(lacks, 40)}")
    return found


def describes_weights(text: str, meta: Mapping[str, Any]) -> bool:
    """Whether the contents of a JSON file describe weights, so that `meta` may replace them; also if the JSON is damaged."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError, MemoryError):
        return not text.strip("\0 \t\r\n") or any(f'"{name}"' in text for name in _OF_WEIGHTS)
    return isinstance(found, dict) and (bool(found.keys() & _OF_WEIGHTS) or found.keys() <= meta.keys())


def grid_of(meta: Mapping[str, Any], stride: int, patches: int) -> tuple[int, int] | None:
    """The grid, (height, width), of that many patches of `stride` pixels: by "image_size" where that makes as many, else a
    square; None where they make none.
    """
    size = meta.get("image_size")
    height: Any
    width: Any
    height, width = size if isinstance(size, list | tuple) and len(size) == 2 else (size, size)
    whole = type(height) is type(width) is int and min(height, width) > 0 and height % stride == width % stride == 0
    if whole and (height // stride) * (width // stride) == patches:
        return height // stride, width // stride
    side = math.isqrt(patches)
    return (side, side) if side * side == patches else None


def image_size(meta: Mapping[str, Any], stride: int, patches: int) -> tuple[int, int]:
    """Height and width of the images that make the patches: what `meta` says, or a square where it says nothing.

    CheckpointError where they make no square, and where they are not as many as what it says.
    """
    grid, said = grid_of(meta, stride, patches), meta.get("image_size")
    if grid is None:
        raise CheckpointError(
            f"{patches} positions make no square; the JSON beside the weights should say image_size as [height, width]"
        )
    size = (grid[0] * stride, grid[1] * stride)
    if said is not None and list(said if isinstance(said, list | tuple) else (said, said)) != list(size):
        raise CheckpointError(
            f"the JSON beside the weights says image_size {printable(said, 100)}, their {patches} positions are for "
            f"{size[0]}×{size[1]} pixels"
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
    # Half a character, which JSON may hold, can be neither printed nor written.
    return [str(name).encode("utf-8", "backslashreplace").decode() for name in names]


def statistics(meta: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the channels, of images in [0, 1]; Google's if `meta` does not say.

    Raises:
      CheckpointError: unless each is a list of three numbers, the mean's between -1e4 and 1e4, the others between 1e-4 and 1e4.
    """
    found = meta.get("normalization") or {"mean": 3 * [0.5], "std": 3 * [0.5]}
    if isinstance(found, Mapping):
        mean, std = (_three(found.get(name), least) for name, least in (("mean", -_LARGEST_STATISTIC), ("std", _SMALLEST_STD)))
        if mean and std:
            return mean, std
    raise CheckpointError(
        "normalization should hold a mean and a std of three numbers each, of images in [0, 1] and none larger than "
        f"{_LARGEST_STATISTIC:g}, a std at least {_SMALLEST_STD:g}; the JSON beside the weights has {printable(found, 200)}"
    )


def _three(values: Any, least: float) -> list[float] | None:
    if not isinstance(values, list | tuple) or len(values) != 3:
        return None
    if not all(isinstance(value, numbers.Real) and not isinstance(value, bool) for value in values):
        return None
    # A comparison takes whole numbers too large for a float, and is false for NaN.
    return [float(value) for value in values] if all(least <= value <= _LARGEST_STATISTIC for value in values) else None
