"""What the exports to ONNX and StableHLO share: the description of a model and its forward function of flat parameters.

Both take images uint8 [B, H, W, 3] of the model's size, for any B, and return probabilities float32 [B, classes], or
features float32 [B, D] if the model has no head: scaling and softmax are inside. Weights are stored in float32 or
bfloat16; the computation is in float32. docs/deployment.md says how each is served.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax.errors import CheckpointError
from vit_jax.formats.meta import class_names, eval_crop, image_size, statistics
from vit_jax.models.variants import patches
from vit_jax.models.vit import VisionTransformer
from vit_jax.transforms.preprocess import scale

# By the evaluation's crop of the weights: what a server does to an image of any size.
_RESIZE = {
    "none": "bilinear, half-pixel centres, no antialiasing, straight to image_size whatever the aspect ratio",
    "center": "bilinear, half-pixel centres, antialiasing: the central part of the aspect ratio of image_size, 7/8 as large as "
    "fits into the image, to image_size",
}
Forward = Callable[[Mapping[str, Any], Any], jax.Array]


def describe(path: Path, model: VisionTransformer, params: Mapping[str, Any], meta: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns `meta` with its defaults, and the input, outputs and resizing that a server has to know.

    Raises:
      CheckpointError: if `meta` contradicts the model; the message begins with `path`.
    """
    about = {name: value for name, value in (meta or {}).items() if value is not None}
    try:
        mean, deviation = statistics(about)
        names = class_names(about, model.num_classes)
        sides, crop = image_size(about, model.stride, patches(model, params)), eval_crop(about)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    about |= {
        "normalization": {"mean": mean, "std": deviation},
        "image_size": sides[0] if sides[0] == sides[1] else list(sides),
    }
    if names:
        about["class_names"] = names
    return about | {
        "input": f"B, {sides[0]}, {sides[1]}, 3",
        "outputs": model.num_classes or model.representation_size or model.hidden_size,
        "resize": _RESIZE[crop],
    }


def input_shape(about: Mapping[str, Any]) -> jax.ShapeDtypeStruct:
    """Returns the shape of a batch of images, uint8 [B, H, W, 3] with a symbolic B."""
    return jax.ShapeDtypeStruct(jax.export.symbolic_shape(about["input"]), np.uint8)


def flat_params(params: Mapping[str, Any], dtype: Any) -> dict[str, np.ndarray]:
    """Returns the parameters as arrays of `dtype`, under names that `read_npz` reads."""
    leaves = flatten_dict({"params": params}, sep="/")
    return {name: np.asarray(leaf).astype(dtype, copy=False) for name, leaf in leaves.items()}


def forward_function(model: VisionTransformer, about: Mapping[str, Any]) -> Forward:
    """Returns the function of flat float32 parameters and uint8 images that both formats contain."""
    model = model.clone(dtype=jnp.float32, dropout=0.0, attention_dropout=0.0)
    scaling = (about["normalization"]["mean"], about["normalization"]["std"])

    def forward(flat, images):
        outputs: Any = model.apply(unflatten_dict(flat, sep="/"), scale(images, scaling))
        return jax.nn.softmax(outputs) if model.num_classes else outputs

    return forward
