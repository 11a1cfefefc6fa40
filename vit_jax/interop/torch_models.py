"""Folders that timm and transformers load, with everything in them that they have to set to agree."""

import logging
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_jax.errors import CheckpointError
from vit_jax.formats.meta import class_names, image_size, statistics
from vit_jax.formats.torch_files import save_folder
from vit_jax.formats.torch_names import BACKBONE, HUGGINGFACE, TIMM, spelling, to_torch
from vit_jax.models.variants import VARIANTS, from_tree, name_of, patches
from vit_jax.models.vit import VisionTransformer

_log = logging.getLogger("vit_jax")

# What timm builds, by row of VARIANTS. Another geometry is the first one with the same ResNet, or none, and other arguments.
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
        raise CheckpointError(f"the parameters are no Vision Transformer's: {error}") from None


def to_timm(params: Mapping[str, Any], meta: Mapping[str, Any] | None = None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """timm's tensors (float32) and config.json, with which timm.create_model("local-dir:FOLDER", pretrained=True) agrees.

    `meta` is the JSON beside an npz. The config says what timm has to set: tanh GELU, the geometry, how images are
    prepared. CheckpointError for what timm has no model for: pre_logits, and ResNets other than those published.
    """
    model, meta = _model(params), meta or {}
    if model.representation_size:
        raise CheckpointError(
            "timm's Vision Transformer has no pre_logits (a dense layer and tanh before the head): leave pre_logits and head "
            "out (`convert … --features`, or vit_jax.load(SOURCE, num_classes=0))"
        )
    alike = (architecture for name, architecture in _ARCHITECTURES.items() if VARIANTS[name]["resnet"] == model.resnet)
    architecture = _ARCHITECTURES.get(name_of(model) or "") or next(alike, None)
    if architecture is None or (model.resnet is not None and model.resnet_width != 64):
        raise CheckpointError(
            f"timm has no hybrid whose ResNet has stages of {list(model.resnet or ())} units and {model.resnet_width} channels"
        )
    height, width = image_size(meta, model.stride, patches(model, params))
    root = None if model.resnet is None else f"{BACKBONE}stem." if model.resnet else BACKBONE
    units = [(stage, unit) for stage, units in enumerate(model.resnet or ()) for unit in range(units)]
    ratio = model.mlp_dim / model.hidden_size
    if int(ratio * model.hidden_size) != model.mlp_dim:  # which is how timm makes a width of it
        ratio = math.nextafter(ratio, math.inf)
    pooling: dict[str, Any] = {"global_pool": "token"}
    if model.classifier != "token":
        pooling = {"global_pool": "avg", "class_token": False, "fc_norm": False}
    mean, std = statistics(meta)
    names = class_names(meta, model.num_classes)
    config = {
        "architecture": architecture,
        "num_classes": model.num_classes,
        "num_features": model.hidden_size,
        "global_pool": pooling["global_pool"],
        "model_args": {
            "img_size": [height, width],
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
        "pretrained_cfg": {
            "num_classes": model.num_classes,
            "input_size": [3, height, width],
            "fixed_input_size": True,
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "squash",  # straight to the size, whatever the image's aspect
            "mean": mean,
            "std": std,
            "first_conv": "patch_embed.proj" if root is None else f"{root}conv",
            "classifier": "head",
        },
    }
    return to_torch(params, spelling(TIMM, range(model.num_layers), units, root)), config


def to_huggingface(
    params: Mapping[str, Any], meta: Mapping[str, Any] | None = None, classifier: bool | None = None
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, Any]]]:
    """Hugging Face's tensors (float32), and what config.json and preprocessor_config.json say, under those names.

    The names are the ones that transformers itself writes to disk, which every version reads. A model with a head becomes a
    ViTForImageClassification. One with pre_logits becomes a ViTModel whose pooler they are, without its head, of which the
    log tells; one with neither is a ViTModel without a pooler. `classifier` says which is wanted. `meta` is the JSON beside
    an npz. CheckpointError for what transformers has no model for: a classifier with pre_logits, hybrids, a mean of tokens.
    """
    model, meta = _model(params), meta or {}
    if model.resnet is not None:
        raise CheckpointError("transformers 5 has no hybrid Vision Transformer: timm has (--to timm)")
    if model.classifier != "token":
        raise CheckpointError("Hugging Face's ViT classifies from a class token, this model from the mean of its tokens")
    if classifier and model.representation_size:
        raise CheckpointError(
            "Hugging Face's ViTForImageClassification has no pooler, where pre_logits belong: export the ViTModel, whose "
            "pooler they are, or give the model a head of its own by fine-tuning"
        )
    if classifier and not model.num_classes:
        raise CheckpointError("the model has no head, without which there is no ViTForImageClassification")
    if classifier is None:
        classifier = bool(model.num_classes) and not model.representation_size
        if model.num_classes and not classifier:
            _log.warning("exported as ViTModel, with pre_logits as its pooler; the head of %d classes stays behind, "
                         "for ViTForImageClassification has no pooler", model.num_classes)  # fmt: skip
    if not classifier:
        params = {name: module for name, module in params.items() if name != "head"}
    height, width = image_size(meta, model.stride, patches(model, params))
    names = class_names(meta, model.num_classes) if classifier else None
    labels = (
        {}
        if not classifier
        else {"num_labels": model.num_classes}
        if names is None
        else {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    )
    pooler = {"pooler_act": "tanh", "pooler_output_size": model.representation_size} if model.representation_size else {}
    mean, std = statistics(meta)
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
    spelled = spelling(HUGGINGFACE, range(model.num_layers), (), None)
    if classifier:
        spelled = {path: name if path.startswith("head/") else f"vit.{name}" for path, name in spelled.items()}
    return to_torch(params, spelled), {"config.json": config, "preprocessor_config.json": preprocessor}


def save_timm(
    folder: str | os.PathLike, params: Mapping[str, Any], meta: Mapping[str, Any] | None = None, dtype: Any = np.float32
) -> None:
    """Writes a folder for timm: model.safetensors in float32 or bfloat16 and config.json. As `to_timm`; FileExistsError."""
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

    As `to_huggingface`; FileExistsError where the folder holds something already.
    """
    tensors, texts = to_huggingface(params, meta, classifier)
    texts["config.json"]["dtype"] = np.dtype(dtype).name
    save_folder(folder, tensors, _model(params).num_heads, dtype, texts)
