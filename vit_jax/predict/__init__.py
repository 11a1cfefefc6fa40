"""Classification of images: `Classifier` in Python, `python -m vit_jax.predict` on a command line."""

import importlib
from typing import Any

# Name → module, imported when first used (PEP 562), because the command line imports this file before it handles Ctrl-C.
_DOORS = {"Classifier": "classifier", "ImageError": "images"}

__all__ = sorted(_DOORS)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _DOORS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_DOORS[name]}"), name)
