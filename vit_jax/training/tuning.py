"""What is trained: all parameters, a part of them, or adapters next to frozen ones. The model knows nothing of it.

A run trains a tree that is the model's, with the subtree ADAPTERS if it trains adapters. `plain` makes the model's tree of it,
in which adapters are merged into the kernels and frozen leaves pass no gradient.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax

from vit_jax.config import Config, Model
from vit_jax.errors import ConfigError
from vit_jax.models.vit import VisionTransformer

ADAPTERS = "adapters"  # the subtree of the tree that is trained
_ATTENTION = r"Transformer/encoderblock_\d+/MultiHeadDotProductAttention_1"
# model.tune → the names of the leaves that are trained. The head always is, so no choice freezes everything.
_TRAINED = {
    "all": ".*",
    "head": "head/.*",
    "attention": rf"(head|Transformer/posembed_input|{_ATTENTION})/.*",  # facebookresearch/deit, main.py --attn-only
    "frozen_embedding": r"(?!(embedding|conv_root|gn_root|block\d+)/).*",  # and, of a hybrid, the stages before it
    "lora": f"(head|{ADAPTERS})/.*",
    "ssf": f"(head|{ADAPTERS})/.*",
}
_LORA = rf"({_ATTENTION}/(query|value))/kernel"
_SSF = r"(embedding|Transformer/encoder_norm|Transformer/encoderblock_\d+/.*)/(kernel|scale)"


def check(settings: Model, model: VisionTransformer) -> None:
    """Raises ConfigError if the rank of LoRA is above the width of the model."""
    if settings.tune == "lora" and settings.lora_rank > model.hidden_size:
        name = "checkpoint" if settings.checkpoint else "variant"
        raise ConfigError(
            f"model.lora_rank = {settings.lora_rank} is above {model.hidden_size}, the width of model.{name} = "
            f"{getattr(settings, name)!r}"
        )


def is_plain(config: Config) -> bool:
    """Whether the parameters that a run yields are those of its state: neither averaged nor with adapters."""
    return not (config.optimizer.ema or has_adapters(config.model))


def has_adapters(settings: Model) -> bool:
    """Whether the tree that is trained has adapters."""
    return settings.tune in ("lora", "ssf")


def model_tree(params: Mapping[str, Any]) -> dict[str, Any]:
    """The tree that is trained, without the adapters: the model's, whose kernels are those before training if there are any."""
    return {name: node for name, node in params.items() if name != ADAPTERS}


def trainable(params: Any, settings: Model) -> Any:
    """A tree of booleans: whether each leaf of the tree that is trained is changed by training."""

    def matches(path: tuple[Any, ...], _: Any) -> bool:
        return re.fullmatch(_TRAINED[settings.tune], "/".join(key.key for key in path)) is not None

    return jax.tree_util.tree_map_with_path(matches, params)


def mask(settings: Model) -> Callable[[Any], Any] | None:
    """`trainable` as a function of the tree, for the optimizer; None if everything is trained."""
    return None if settings.tune == "all" else functools.partial(trainable, settings=settings)


def describe(params: Any, settings: Model) -> str:
    """How many parameters the tree that is trained has, and how many of them are trained; leaves need only shapes."""
    sizes = jax.tree.map(lambda is_trained, leaf: (leaf.size, is_trained * leaf.size), trainable(params, settings), params)
    total, trained = (sum(column) for column in zip(*jax.tree.leaves(sizes, is_leaf=lambda n: type(n) is tuple), strict=True))
    return f"{total:,} parameters" if trained == total else f"{trained:,} of {total:,} parameters trained"


def initial(params: Mapping[str, Any], settings: Model, key: jax.Array) -> dict[str, Any]:
    """The tree that training starts from, whose logits are those of `params`.

    LoRA (Hu et al. 2022): for each query and value kernel W, seen as a matrix [inputs, outputs], two kernels a [inputs, rank]
    and b [rank, outputs], which add (alpha / rank) · a · b to it. As in the authors' loralib, a is drawn from the uniform
    distribution of ±1 / √inputs, and b is 0.

    SSF (Lian et al. 2022): for the patch embedding and each dense layer and LayerNorm of the encoder a scale γ and a shift δ of
    its outputs, in the shape of its bias. They start at 1 and 0; the paper draws them around these.

    Args:
      params: the model's, float32.
      settings: with tune, lora_rank.
      key: of the draws of this run, `keys.stream(seed, keys.LORA)`.
    """
    flat, adapters = flatten_dict(params, sep="/"), {}
    if settings.tune == "lora":
        for number, name in enumerate(sorted(name for name in flat if re.fullmatch(_LORA, name))):
            module, shape, rank = name.removesuffix("/kernel"), flat[name].shape, settings.lora_rank
            bound = 1 / math.sqrt(shape[0])
            draws = jax.random.uniform(jax.random.fold_in(key, number), (shape[0], rank), jnp.float32, -bound, bound)
            adapters[f"{module}/a/kernel"] = draws
            adapters[f"{module}/b/kernel"] = jnp.zeros((rank, math.prod(shape[1:])))
    if settings.tune == "ssf":
        for found in filter(None, (re.fullmatch(_SSF, name) for name in flat)):
            shape = flat[f"{found[1]}/bias"].shape
            adapters |= {f"{found[1]}/scale": jnp.ones(shape), f"{found[1]}/shift": jnp.zeros(shape)}
    return {**params, ADAPTERS: unflatten_dict(adapters, sep="/")} if adapters else dict(params)


def plain(params: Mapping[str, Any], settings: Model) -> dict[str, Any]:
    """The model's tree of a tree that is trained: frozen leaves stopped, adapters merged.

    x (W + s a b) is x W + s (x a) b, and γ (x W + β) + δ is x (γ W) + (γ β + δ); of a LayerNorm, W is its scale.
    """
    tree = model_tree(params)
    stopped = jax.tree.map(lambda trained, leaf: leaf if trained else lax.stop_gradient(leaf), trainable(tree, settings), tree)
    flat, adapters = flatten_dict(stopped, sep="/"), flatten_dict(params.get(ADAPTERS, {}), sep="/")
    for name, adapter in adapters.items():
        module, _, kind = name.rpartition("/")
        if name.endswith("/a/kernel"):
            kernel = f"{module.removesuffix('/a')}/kernel"
            product = jnp.matmul(adapter, adapters[name.replace("/a/", "/b/")], precision=lax.Precision.HIGHEST)
            scale = (settings.lora_alpha or settings.lora_rank) / settings.lora_rank
            flat[kernel] = flat[kernel] + scale * product.reshape(flat[kernel].shape)
        elif kind == "shift":
            bias, weights = f"{module}/bias", f"{module}/{'kernel' if f'{module}/kernel' in flat else 'scale'}"
            scale = adapters[f"{module}/scale"]
            flat[bias] = scale * flat[bias] + adapter
            flat[weights] = scale.reshape((1,) * (flat[weights].ndim - scale.ndim) + scale.shape) * flat[weights]
    return unflatten_dict(flat, sep="/")
