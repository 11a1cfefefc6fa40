"""The configurations of timm and Hugging Face: a field that asks for another computation than Google's models is refused.

A configuration may ask for an activation, a pooling or a normalisation that the tensors do not show. Every known field
either has no effect on inference, is given by the tensors' shapes, or must have the value of Google's models.
Sources: timm 1.0 `models/vision_transformer.py` (`VisionTransformer.__init__`) and `models/_hub.py`; transformers 5
`models/vit/configuration_vit.py`.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from vit_jax.errors import CheckpointError, printable
from vit_jax.formats.meta import eval_crop, statistics
from vit_jax.models.vit import GOOGLE_NORMALIZATION

_LARGEST_EPSILON = 1e-5  # of LayerNorm; ours is 1e-6, and up to this limit the outputs agree to about 1e-5


def _is(*values: Any) -> Callable[[Any], bool]:
    return lambda found: any(found is value or (type(found) is type(value) and found == value) for value in values)


def _is_small(found: Any) -> bool:
    return isinstance(found, int | float) and not isinstance(found, bool) and 0 <= found <= _LARGEST_EPSILON


# Field → check of its value. GELU: Google's models use the tanh approximation whatever the copies say (docs/checkpoints.md).
HUGGINGFACE: dict[str, Callable[[Any], bool]] = {
    "hidden_act": _is("gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate", "gelu_python", "gelu_python_tanh"),
    "layer_norm_eps": _is_small,
    "pooler_act": _is("tanh", None),
    "qkv_bias": _is(True),
    "num_channels": _is(3),
    "model_type": _is("vit", "vit_msn"),  # other models have the same tensors and compute something else
    "pruned_heads": _is({}, None),
}
TIMM: dict[str, Callable[[Any], bool]] = {
    "act_layer": _is(None, "", "gelu", "gelu_tanh"),
    "norm_layer": _is(None, "", "layernorm"),
    "global_pool": _is("token", "avg", None),
    "qkv_bias": _is(True),
    "proj_bias": _is(True),
    "in_chans": _is(3),
    "pos_embed": _is("learn", ""),
    "final_norm": _is(True),
    "reg_tokens": _is(0),
    **dict.fromkeys(("no_embed_class", "pre_norm", "qk_norm", "scale_attn_norm", "scale_mlp_norm", "attn_gate"), _is(False)),
    **dict.fromkeys(("init_values", "embed_norm_layer", "embed_layer", "block_fn", "mlp_layer", "attn_layer"), _is(None)),
    **dict.fromkeys(("fc_norm", "pool_include_prefix"), _is(None, False)),
    "class_token": _is(True, False),  # compared with the tensors
}
# Given by the tensors, used in training only, or about loading.
TIMM_HARMLESS = frozenset(
    [
        *("img_size", "patch_size", "num_classes", "embed_dim", "depth", "num_heads", "mlp_ratio", "backbone"),
        *("dynamic_img_size", "dynamic_img_pad", "strict_img_size", "pretrained_strict", "device", "dtype"),
        *("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"),
        *("weight_init", "fix_init"),
    ]
)
# timm's names of plain Vision Transformers; other architectures set fields that the file does not repeat.
_PLAIN = re.compile(r"(vit|deit)_([a-z0-9]+)_(patch\d+|r\d*_s\d+(_p\d+)?)(_siglip_gap)?_\d+(\.\w+)?")
# Attention heads by the size in an architecture's name: timm's default, whatever the width.
_HEADS = {"tiny": 3, "small": 6, "base": 12, "large": 16, "huge": 16, "giant": 16, "gigantic": 16, "so400m": 16, "giantopt": 16}
_HUGGINGFACE_HEADS = 12  # transformers' default, whatever the width
_IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}  # timm's default


def check_config(config: Mapping[str, Any], has_class_token: bool) -> None:
    """Checks that config.json next to a safetensors file asks for the computation of this package's models.

    Raises:
      CheckpointError: if it does not; the message names the field and its value.
    """
    arguments = config.get("model_args")
    if arguments is not None and not isinstance(arguments, Mapping):
        raise CheckpointError(f"model_args in config.json should be an object, is {printable(arguments, 80)}")
    for name, allowed in HUGGINGFACE.items():
        if name in config and not allowed(config[name]):
            raise _refused(name, config[name])
    for name, value in (arguments or {}).items():
        if name in TIMM:
            if not TIMM[name](value):
                raise _refused(f"model_args.{name}", value)
        elif name not in TIMM_HARMLESS:
            raise _refused(f"model_args.{name}", value)
    architecture = config.get("architecture")
    if architecture is not None and not (isinstance(architecture, str) and _PLAIN.fullmatch(architecture)):
        raise _refused("architecture", architecture)
    for where, found in (("", config), ("model_args.", arguments or {})):
        pooling = found.get("global_pool")
        if pooling not in (None, "token" if has_class_token else "avg"):
            raise CheckpointError(
                f"config.json has {where}global_pool = {printable(pooling, 80)!r}, expected "
                f"{'token' if has_class_token else 'avg'!r} because the file has {'a' if has_class_token else 'no'} class token"
            )
    if (arguments or {}).get("class_token", has_class_token) != has_class_token:
        raise _refused("model_args.class_token", arguments["class_token"])  # type: ignore[index]


def heads_of(config: Mapping[str, Any]) -> int | None:
    """Returns the number of attention heads that timm or transformers would use, their defaults included.

    Returns:
      None if the configuration is neither timm's nor Hugging Face's.

    Raises:
      CheckpointError: if it is not a positive integer, or is missing and timm's architecture is unknown.
    """
    arguments = config.get("model_args")
    found = config.get("num_attention_heads", arguments.get("num_heads") if isinstance(arguments, Mapping) else None)
    if found is not None:
        if type(found) is not int or found < 1:
            raise CheckpointError(
                f"config.json next to it gives {printable(repr(found), 80)} attention heads, expected a positive integer"
            )
        return found
    if "architecture" in config:
        plain = _PLAIN.fullmatch(str(config["architecture"]))
        if not plain or plain[2] not in _HEADS:
            raise CheckpointError(
                f"config.json does not give how many attention heads {printable(repr(config['architecture']), 80)} has; "
                "add model_args.num_heads"
            )
        return _HEADS[plain[2]]
    return _HUGGINGFACE_HEADS if "model_type" in config or "architectures" in config else None


def describe(config: Mapping[str, Any], processor: Mapping[str, Any]) -> dict[str, Any]:
    """Translates config.json and preprocessor_config.json to the fields of the JSON next to an npz.

    Returns:
      "image_size", "normalization", "eval_crop" and "class_names", each if it is given. timm's crop_pct and crop_mode are not
      used, because Google's models are evaluated without a crop, whatever the copies say.

    Raises:
      CheckpointError: if a field cannot be used; the message names it.
    """
    meta = {
        "image_size": _image_size(config),
        "normalization": _normalization(config, processor),
        "eval_crop": eval_crop(config) if "eval_crop" in config else None,
        "class_names": _class_names(config),
    }
    return {name: value for name, value in meta.items() if value is not None}


def _object(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = config.get(name)
    if found is not None and not isinstance(found, Mapping):
        raise CheckpointError(f"{name} in config.json should be an object, is {printable(repr(found), 80)}")
    return found or {}


def _pretrained(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns timm's description of the pre-training; older files have its fields at the top level."""
    return _object(config, "pretrained_cfg") or (config if "architecture" in config else {})


def _image_size(config: Mapping[str, Any]) -> int | list[int] | None:
    """Returns a side or [height, width]. The argument of timm's model takes precedence over the size in pre-training."""
    found, name = _object(config, "model_args").get("img_size"), "model_args.img_size"
    if found is None:
        found, name = _pretrained(config).get("input_size"), "input_size"
        if found is not None:  # channels, height, width
            found = found[1:] if isinstance(found, list) and len(found) == 3 else [found]
    if found is None:
        found, name = config.get("image_size"), "image_size"
    if found is None:
        return None
    sides: list[Any] = found if isinstance(found, list) else [found, found]
    if len(sides) != 2 or not all(type(side) is int and 0 < side < 2**20 for side in sides):
        raise CheckpointError(f"{name} in config.json should be one or two positive integers, is {printable(repr(found), 80)}")
    return sides[0] if sides[0] == sides[1] else list(sides)


def _normalization(config: Mapping[str, Any], processor: Mapping[str, Any]) -> dict[str, list[float]] | None:
    timm = _pretrained(config)
    if timm:
        found = {name: timm.get(name) or default for name, default in _IMAGENET.items()}
    elif processor:
        factor = processor.get("rescale_factor", 1 / 255)
        if processor.get("do_rescale", True) is not True or type(factor) is not float or not abs(255 * factor - 1) < 1e-6:
            raise CheckpointError("do_rescale and rescale_factor in preprocessor_config.json should scale pixels by 1/255")
        found = {name: processor.get(f"image_{name}") for name in ("mean", "std")}
        google = dict(zip(("mean", "std"), GOOGLE_NORMALIZATION, strict=True))  # transformers' default as well
        found = {name: list(google[name]) if value is None else value for name, value in found.items()}
        found = {name: 3 * [value] if isinstance(value, int | float) else value for name, value in found.items()}
        if not processor.get("do_normalize", True):
            found = {"mean": 3 * [0.0], "std": 3 * [1.0]}
    else:
        return None
    mean, std = statistics({"normalization": found})
    return {"mean": mean, "std": std}


def _class_names(config: Mapping[str, Any]) -> list[str] | None:
    names: Any = config.get("label_names", _pretrained(config).get("label_names"))
    labels = config.get("id2label")
    if labels is not None:
        if not isinstance(labels, Mapping) or {str(i) for i in range(len(labels))} != labels.keys():
            raise CheckpointError("id2label in config.json should be an object with the keys 0, 1, …, one per class")
        names = [labels[str(i)] for i in range(len(labels))]
    if names is None:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError("label_names or id2label in config.json should hold strings, one per class")
    return None if names[:1] == ["LABEL_0"] else names  # names that transformers generates


def _refused(name: str, value: Any) -> CheckpointError:
    return CheckpointError(
        f"config.json has {printable(name, 80)} = {printable(repr(value), 80)}, which changes the model's outputs and is not "
        "supported"
    )
