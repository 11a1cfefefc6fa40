"""The description of weights: the JSON next to an npz, and the checks of its fields."""

import json
import math
import numbers
from collections.abc import Mapping
from typing import Any

from vit_jax.config_rules import CHOICES
from vit_jax.errors import CheckpointError, printable, reason
from vit_jax.models.vit import GOOGLE_NORMALIZATION

# Of pixel values in [0, 1]; values scaled by statistics within these limits fit into float32.
_MAX_STATISTIC, _MIN_STD = 1e4, 1e-4
_MAX_DEPTH = 20  # levels of nesting
# Fields at the top level that only a description of weights has.
_OF_WEIGHTS = {
    *("image_size", "normalization", "eval_crop", "class_names", "source_sha256", "copy_of", "lacks", "accuracy", "step"),
}


def _is_deeper(value: Any, levels: int) -> bool:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels < 0 or any(_is_deeper(child, levels - 1) for child in children)


def parse(text: str | bytes, source: object) -> dict[str, Any]:
    """Parses the JSON object that describes weights.

    Raises:
      CheckpointError: if the text is anything else; the message begins with `source`.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError, MemoryError) as error:
        raise CheckpointError(f"{source} is not JSON: {reason(error)}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{source} should hold an object that describes the weights, holds {printable(found, 40)!r}")
    if _is_deeper(found, _MAX_DEPTH):
        raise CheckpointError(f"{source} is nested in more than {_MAX_DEPTH} levels, the limit for a description of weights")
    missing = found.get("lacks")
    if missing is not None and not (isinstance(missing, list) and all(isinstance(name, str) for name in missing)):
        raise CheckpointError(f"{source}: lacks should be a list of names, is {printable(missing, 40)}")
    return found


def describes_weights(text: str, meta: Mapping[str, Any]) -> bool:
    """Whether a JSON file's text, also a damaged one, describes weights, so that `meta` may replace it."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError, MemoryError):
        return not text.strip("\0 \t\r\n") or any(f'"{name}"' in text for name in _OF_WEIGHTS)
    return isinstance(found, dict) and (bool(found.keys() & _OF_WEIGHTS) or found.keys() <= meta.keys())


def grid_of(meta: Mapping[str, Any], stride: int, patches: int) -> tuple[int, int] | None:
    """Returns the grid, (height, width), of a number of patches.

    Args:
      meta: the description; its "image_size" gives the grid if it makes as many patches.
      stride: pixels of a patch's side.
      patches: their number.

    Returns:
      That grid, else a square one, else None if the number is not a square.
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
    """Returns the height and width in pixels of the images that give this number of patches.

    Raises:
      CheckpointError: if "image_size" in `meta` gives another number of patches, or is missing and the number is not a square.
    """
    grid, stated = grid_of(meta, stride, patches), meta.get("image_size")
    if grid is None:
        raise CheckpointError(
            f"{patches} positions do not form a square; the JSON next to the weights should give image_size as [height, width]"
        )
    size = (grid[0] * stride, grid[1] * stride)
    if stated is not None and list(stated if isinstance(stated, list | tuple) else (stated, stated)) != list(size):
        raise CheckpointError(
            f"image_size is {printable(stated, 100)} in the JSON next to the weights, but their {patches} positions are for "
            f"{size[0]}×{size[1]} pixels"
        )
    return size


def class_names(meta: Mapping[str, Any], num_classes: int) -> list[str] | None:
    """Returns the names of the classes; None if there are none or the model has no head.

    Raises:
      CheckpointError: if their number is not that of the classes.
    """
    names = meta.get("class_names")
    if not names or not num_classes:
        return None
    if not isinstance(names, list | tuple):
        raise CheckpointError(f"class_names in the JSON next to the weights should be a list, is {type(names).__name__}")
    if len(names) != num_classes:
        raise CheckpointError(f"the head has {num_classes} classes, but the JSON next to the weights names {len(names)}")
    # JSON may hold a lone surrogate, which can be neither printed nor written.
    return [str(name).encode("utf-8", "backslashreplace").decode() for name in names]


def statistics(meta: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """Returns the channels' mean and standard deviation, of pixel values in [0, 1]; Google's if `meta` has none.

    Raises:
      CheckpointError: unless each is a list of three numbers, the mean's from -1e4 to 1e4, the standard deviation's from 1e-4
        to 1e4.
    """
    found = meta.get("normalization") or dict(zip(("mean", "std"), GOOGLE_NORMALIZATION, strict=True))
    if isinstance(found, Mapping):
        mean, std = (_three(found.get(name), least) for name, least in (("mean", -_MAX_STATISTIC), ("std", _MIN_STD)))
        if mean and std:
            return mean, std
    raise CheckpointError(
        f"normalization in the JSON next to the weights is {printable(found, 200)}; it should hold a mean and a std of three "
        f"numbers each, of pixel values in [0, 1], none above {_MAX_STATISTIC:g}, the std's at least {_MIN_STD:g}"
    )


def eval_crop(meta: Mapping[str, Any]) -> str:
    """Returns how images are cropped for evaluation, "none" or "center"; "none" if `meta` does not say it.

    Raises:
      CheckpointError: if it is another value.
    """
    found, allowed = meta.get("eval_crop"), CHOICES["augment.eval_crop"]
    if found is not None and found not in allowed:
        raise CheckpointError(
            f"eval_crop in the JSON next to the weights is {printable(repr(found), 80)}; it should be one of "
            f"{', '.join(map(repr, allowed))}"
        )
    return found or "none"


def _three(values: Any, least: float) -> list[float] | None:
    if not isinstance(values, list | tuple) or len(values) != 3:
        return None
    if not all(isinstance(value, numbers.Real) and not isinstance(value, bool) for value in values):
        return None
    # Comparisons accept integers too large for a float, and are false for NaN.
    return [float(value) for value in values] if all(least <= value <= _MAX_STATISTIC for value in values) else None
