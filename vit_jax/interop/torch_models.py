"""Folders that timm and transformers load; their configuration files set everything that makes the outputs agree."""

import logging
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_jax.errors import CheckpointError
from vit_jax.formats.meta import class_names, eval_crop, image_size, statistics
from vit_jax.formats.torch_files import save_folder
from vit_jax.formats.torch_names import BACKBONE, HUGGINGFACE, TIMM, spelling, to_torch
from vit_jax.models.variants import VARIANTS, from_tree, name_of, patches
from vit_jax.models.vit import VisionTransformer
from vit_jax.resampling import CENTER

_log = logging.getLogger("vit_jax")

# Row of VARIANTS → timm's architecture. Another geometry uses the first one with the same ResNet (or none) and arguments.
_ARCHITECTURES = {
    "B/16": "vit_base_patch16_224",
    "Ti/16": "vit_tiny_patch16_224",
    "S/16": "vit_small_patch16_224",
    "S/32": "vit_small_patch32_224",
    "B/8": "vit_base_patch8_224",
    "B/32": "vit_base_patch32_224",
    "L/16": "vit_large_patch16_224",
    "L/32": "vit_large_patch32_224",
    "H/14": "vit_huge_patch14_224",
    "R+Ti/16": "vit_tiny_r_s16_p8_224",
    "R26+S/32": "vit_small_r26_s32_224",
    "R26+B/32": "vit_base_r26_s32_224",
    "R50+B/16": "vit_base_r50_s16_224",
    "R50+L/32": "vit_large_r50_s32_224",
}


def _model(params: Mapping[str, Any]) -> VisionTransformer:
    try:
        return from_tree(params)
    except ValueError as error:
        raise CheckpointError(f"the parameters do not form a Vision Transformer: {error}") from None


def to_timm(params: Mapping[str, Any], meta: Mapping[str, Any] | None = None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Converts a model for timm: timm.create_model("local-dir:FOLDER", pretrained=True) gives the same outputs.

    Args:
      params: the parameter tree.
      meta: the JSON next to an npz.

    Returns:
      timm's tensors (float32), and the object of config.json, which sets the tanh GELU, the geometry and how images are
      prepared.

    Raises:
      CheckpointError: if timm has no such model (pre_logits, ResNets other than the published ones), or `meta` contradicts it.
    """
    model, meta = _model(params), meta or {}
    if model.representation_size:
        raise CheckpointError(
            "timm's Vision Transformer has no pre_logits (a dense layer and tanh before the head): leave pre_logits and head "
            "out (`convert … --features`, or vit_jax.load(SOURCE, num_classes=0))"
        )
    config = _timm_config(model, image_size(meta, model.stride, patches(model, params)), meta)
    root = None if model.resnet is None else f"{BACKBONE}stem." if model.resnet else BACKBONE
    units = [(stage, unit) for stage, units in enumerate(model.resnet or ()) for unit in range(units)]
    return to_torch(params, spelling(TIMM, range(model.num_layers), units, root)), config


def _timm_config(model: VisionTransformer, size: tuple[int, int], meta: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the object of timm's config.json for a model of images of `size`, (height, width)."""
    alike = (architecture for name, architecture in _ARCHITECTURES.items() if VARIANTS[name]["resnet"] == model.resnet)
    architecture = _ARCHITECTURES.get(name_of(model) or "") or next(alike, None)
    if architecture is None or (model.resnet is not None and model.resnet_width != 64):
        raise CheckpointError(
            f"timm has no hybrid whose ResNet has stages of {list(model.resnet or ())} units and {model.resnet_width} channels"
        )
    ratio = model.mlp_dim / model.hidden_size
    if int(ratio * model.hidden_size) != model.mlp_dim:  # timm rounds down
        ratio = math.nextafter(ratio, math.inf)
    pooling: dict[str, Any] = {"global_pool": "token"}
    if model.classifier != "token":
        pooling = {"global_pool": "avg", "class_token": False, "fc_norm": False}
    (mean, std), crop = statistics(meta), eval_crop(meta)
    names = class_names(meta, model.num_classes)
    root_conv = f"{BACKBONE}stem.conv" if model.resnet else f"{BACKBONE}conv"
    return {
        "architecture": architecture,
        "num_classes": model.num_classes,
        "num_features": model.hidden_size,
        "global_pool": pooling["global_pool"],
        "model_args": {
            "img_size": list(size),
            "patch_size": model.patch_size,
            "embed_dim": model.hidden_size,
            "depth": model.num_layers,
            "num_heads": model.num_heads,
            "mlp_ratio": ratio,
            "act_layer": "gelu_tanh",
            "norm_layer": "layernorm",  # timm's own, with an epsilon of 1e-6
            **pooling,
        },
        **({"label_names": names} if names else {}),
        **({"eval_crop": crop} if crop != "none" else {}),  # read by this package only
        "pretrained_cfg": {
            "num_classes": model.num_classes,
            "input_size": [3, *size],
            "fixed_input_size": True,
            "interpolation": "bilinear",
            "crop_pct": CENTER if crop == "center" else 1.0,
            "crop_mode": "center" if crop == "center" else "squash",  # straight to the size, whatever the image's aspect ratio
            "mean": mean,
            "std": std,
            "first_conv": "patch_embed.proj" if model.resnet is None else root_conv,
            "classifier": "head",
        },
    }


def to_huggingface(
    params: Mapping[str, Any], meta: Mapping[str, Any] | None = None, classifier: bool | None = None
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, Any]]]:
    """Converts a model for transformers. The tensors have the names that transformers writes, which every version reads.

    A model with a head becomes a ViTForImageClassification. A model with pre_logits becomes a ViTModel with pre_logits as its
    pooler; its head is left out, and a warning is logged. A model with neither is a ViTModel without a pooler.

    Args:
      params: the parameter tree.
      meta: the JSON next to an npz.
      classifier: True for a ViTForImageClassification, False for a ViTModel; None: as above.

    Returns:
      Hugging Face's tensors (float32), and file name → object of config.json and preprocessor_config.json.

    Raises:
      CheckpointError: if transformers has no such model (a classifier with pre_logits, hybrids, the mean of all tokens), or
        `meta` contradicts the model.
    """
    model, meta = _model(params), meta or {}
    if model.resnet is not None:
        raise CheckpointError("transformers 5 has no hybrid Vision Transformer; timm has one (--to timm)")
    if model.classifier != "token":
        raise CheckpointError("Hugging Face's ViT classifies from a class token, this model from the mean of all tokens")
    if classifier and model.representation_size:
        raise CheckpointError(
            "Hugging Face's ViTForImageClassification has no pooler for pre_logits: export a ViTModel, or fine-tune the model, "
            "which replaces pre_logits and head by a new head"
        )
    if classifier and not model.num_classes:
        raise CheckpointError("the model has no head, which ViTForImageClassification needs")
    if classifier is None:
        classifier = bool(model.num_classes) and not model.representation_size
        if model.num_classes and not classifier:
            _log.warning("exported as ViTModel with pre_logits as its pooler; the head of %d classes is left out, "
                         "because ViTForImageClassification has no pooler", model.num_classes)  # fmt: skip
    if not classifier:
        params = {name: module for name, module in params.items() if name != "head"}
    spelled = spelling(HUGGINGFACE, range(model.num_layers), (), None)
    if classifier:
        spelled = {path: name if path.startswith("head/") else f"vit.{name}" for path, name in spelled.items()}
    texts = _huggingface_configs(model, image_size(meta, model.stride, patches(model, params)), meta, classifier)
    return to_torch(params, spelled), texts


def _huggingface_configs(
    model: VisionTransformer, size: tuple[int, int], meta: Mapping[str, Any], classifier: bool
) -> dict[str, dict[str, Any]]:
    """Returns the objects of config.json and preprocessor_config.json for images of `size`, (height, width)."""
    height, width = size
    names = class_names(meta, model.num_classes) if classifier else None
    labels: dict[str, Any] = {"num_labels": model.num_classes} if classifier else {}
    if names is not None:
        labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    pooler = {"pooler_act": "tanh", "pooler_output_size": model.representation_size} if model.representation_size else {}
    (mean, std), crop = statistics(meta), eval_crop(meta)
    if crop != "none":
        _log.warning("preprocessor_config.json resizes straight, but the weights were evaluated with eval_crop = %r", crop)
    config = {
        "architectures": ["ViTForImageClassification" if classifier else "ViTModel"],
        "model_type": "vit",
        "image_size": height if height == width else [height, width],
        "patch_size": model.patch_size,
        "num_channels": 3,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "intermediate_size": model.mlp_dim,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        **pooler,
        **labels,
        **({"eval_crop": crop} if crop != "none" else {}),  # read by this package only
    }
    preprocessor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 2,  # bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }
    return {"config.json": config, "preprocessor_config.json": preprocessor}


def save_timm(
    folder: str | os.PathLike, params: Mapping[str, Any], meta: Mapping[str, Any] | None = None, dtype: Any = np.float32
) -> None:
    """Writes a folder for timm: model.safetensors in float32 or bfloat16, and config.json.

    Raises:
      CheckpointError: as `to_timm`.
      FileExistsError: if the folder holds something already.
    """
    tensors, config = to_timm(params, meta)
    save_folder(folder, tensors, _model(params).num_heads, dtype, {"config.json": config})


def save_huggingface(
    folder: str | os.PathLike,
    params: Mapping[str, Any],
    meta: Mapping[str, Any] | None = None,
    dtype: Any = np.float32,
    classifier: bool | None = None,
) -> None:
    """Writes a folder for transformers: model.safetensors in float32 or bfloat16, config.json, preprocessor_config.json.

    Raises:
      CheckpointError: as `to_huggingface`.
      FileExistsError: if the folder holds something already.
    """
    tensors, texts = to_huggingface(params, meta, classifier)
    texts["config.json"]["dtype"] = np.dtype(dtype).name
    save_folder(folder, tensors, _model(params).num_heads, dtype, texts)
