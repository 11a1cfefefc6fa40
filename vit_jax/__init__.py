"""Fine-tunes Google's published Vision Transformers in JAX/Flax.

What other code may rely on is exported here. Each name is looked up when it is first used (PEP 562), so that importing
the package, or one part of it, does not import all.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

# Name → module.
_DOORS = {
    "Classifier": "predict",
    "Config": "config",
    "VisionTransformer": "models.vit",
    "attention_maps": "models.intermediates",
    "attention_rollout": "models.intermediates",
    "build": "models.variants",
    "features": "models.intermediates",
    "load": "checkpoints.load",
    "preprocess": "transforms.preprocess",
    "save_npz": "formats.google",
    "train": "training.loop",
}

__all__ = sorted([*_DOORS, "runtime"])  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name == "runtime":  # the module, for a notebook's vit_jax.runtime.prepare()
        return importlib.import_module(f"{__name__}.runtime")
    if name not in _DOORS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_DOORS[name]}"), name)


def __dir__() -> list[str]:
    return __all__
