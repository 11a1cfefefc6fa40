"""What happens inside a model: features, attention maps, the outputs of its stages. The model itself stays as it is."""

from typing import Any

import jax
import jax.numpy as jnp

from vit_jax.models.vit import VisionTransformer

_ATTENTION = "MultiHeadDotProductAttention_1"


def features(model: VisionTransformer, params: dict[str, Any], images) -> jax.Array:
    """What the head sees, float32 [B, hidden_size] (after pre_logits, where the model has them); images as the model's."""
    return model.clone(num_classes=0).apply({"params": params}, images)  # type: ignore[return-value]


def _captured(model: VisionTransformer, params: dict[str, Any], images) -> tuple[jax.Array, dict[str, Any]]:
    wanted = ("embedding", "pre_logits", "encoder_norm")
    logits, state = model.apply(
        {"params": params},
        images,
        mutable=["intermediates"],
        capture_intermediates=lambda module, _: (module.name or "").startswith(("encoderblock_", *wanted)),
    )
    return logits, state["intermediates"]


def attention_maps(model: VisionTransformer, params: dict[str, Any], images) -> jax.Array:
    """The attention weights of every layer, [layers, B, heads, tokens, tokens]; each row sums to 1."""
    _, found = _captured(model, params, images)
    blocks = (found["Transformer"][f"encoderblock_{i}"] for i in range(model.num_layers))
    return jnp.stack([block[_ATTENTION]["attention_weights"][0] for block in blocks])


def stages(model: VisionTransformer, params: dict[str, Any], images) -> dict[str, jax.Array]:
    """The outputs of a model's parts in order, for finding where two implementations part.

    "embedding" [B, h, w, D]; "block_0" … [B, T, D]; "features" [B, D], after the last LayerNorm and pooling;
    "pre_logits" [B, R] where the model has them; "logits" [B, classes] where it has a head.
    """
    logits, found = _captured(model, params, images)
    encoder = found["Transformer"]
    result = {"embedding": found["embedding"]["__call__"][0]}
    for i in range(model.num_layers):
        result[f"block_{i}"] = encoder[f"encoderblock_{i}"]["__call__"][0]
    tokens = encoder["encoder_norm"]["__call__"][0]
    result["features"] = tokens[:, 0] if model.classifier == "token" else jnp.mean(tokens, axis=1)
    if model.representation_size:
        result["pre_logits"] = jnp.tanh(found["pre_logits"]["__call__"][0])
    if model.num_classes:
        result["logits"] = logits
    return result
