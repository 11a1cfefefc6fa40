"""The configurations of timm and Hugging Face: what in them changes a model's numbers is ours, or the file is refused.

A configuration may ask for another activation, pooling or normalisation than the tensors show. Every field below is either
of no consequence for inference, told by the tensors' shapes, or has to have the value that Google's models have.
Sources: timm 1.0 `models/vision_transformer.py` (`VisionTransformer.__init__`) and `models/_hub.py`; transformers 5
`models/vit/configuration_vit.py`.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from vit_jax.errors import CheckpointError, printable

_LARGEST_EPSILON = 1e-5  # of LayerNorm; ours is 1e-6, and up to here the outputs agree to about 1e-5


def _is(*values: Any) -> Callable[[Any], bool]:
    return lambda found: any(found is value or (type(found) is type(value) and found == value) for value in values)


def _is_small(found: Any) -> bool:
    return isinstance(found, int | float) and not isinstance(found, bool) and 0 <= found <= _LARGEST_EPSILON


# Field → what its value may be. GELU: Google's models use the tanh approximation whatever the copies say (docs/checkpoints.md).
HUGGINGFACE: dict[str, Callable[[Any], bool]] = {
    "hidden_act": _is("gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate", "gelu_python"),
    "layer_norm_eps": _is_small,
    "pooler_act": _is("tanh", None),
    "qkv_bias": _is(True),
    "num_channels": _is(3),
}
TIMM: dict[str, Callable[[Any], bool]] = {
    "act_layer": _is(None, "", "gelu", "gelu_tanh"),
    "norm_layer": _is(None, "", "layernorm"),
    "global_pool": _is("token", "avg", "", None),
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
# Told by the tensors, of consequence in training only, or about loading.
TIMM_HARMLESS = frozenset(
    [
        *("img_size", "patch_size", "num_classes", "embed_dim", "depth", "num_heads", "mlp_ratio", "backbone"),
        *("dynamic_img_size", "dynamic_img_pad", "strict_img_size", "pretrained_strict", "device", "dtype"),
        *("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"),
        *("weight_init", "fix_init"),
    ]
)
# Of timm's names of architectures those of plain Vision Transformers; others set fields that no file repeats.
_PLAIN = re.compile(r"(vit|deit)_[a-z0-9]+_(patch\d+|r\d*_s\d+(_p\d+)?)(_siglip_gap)?_\d+(\.\w+)?")


def check_config(config: Mapping[str, Any], has_class_token: bool) -> None:
    """Refuses a config.json next to a safetensors file that asks for another computation than this package's.

    Raises:
      CheckpointError: naming the field, its value, and that no model here computes it.
    """
    arguments = config.get("model_args")
    if arguments is not None and not isinstance(arguments, Mapping):
        raise CheckpointError(f"model_args in config.json is no object: {printable(arguments, 80)}")
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
        if pooling not in (None, "", "token" if has_class_token else "avg"):
            raise CheckpointError(
                f"config.json asks for {printable(pooling, 80)!r} pooling ({where}global_pool), and the file has "
                f"{'a' if has_class_token else 'no'} class token: no model of Google's pools so"
            )
    if (arguments or {}).get("class_token", has_class_token) != has_class_token:
        raise _refused("model_args.class_token", arguments["class_token"])  # type: ignore[index]


def heads_of(config: Mapping[str, Any]) -> int | None:
    """The number of attention heads, None where the configuration has none; CheckpointError if it is no positive integer."""
    arguments = config.get("model_args")
    found = config.get("num_attention_heads", arguments.get("num_heads") if isinstance(arguments, Mapping) else None)
    if found is not None and (type(found) is not int or found < 1):
        raise CheckpointError(f"config.json beside it says that there are {printable(repr(found), 80)} attention heads")
    return found


def _refused(name: str, value: Any) -> CheckpointError:
    return CheckpointError(
        f"config.json has {printable(name, 80)} = {printable(repr(value), 80)}, which changes the model's numbers in a "
        "way that is not supported here"
    )
