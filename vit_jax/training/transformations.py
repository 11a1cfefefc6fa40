"""Transformations of gradients that optax has no piece for: SAM, rates by depth, and the average of the parameters."""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

_LAST = {"encoder_norm", "pre_logits", "head"}  # modules after the blocks


def sam(rho: float) -> optax.GradientTransformationExtraArgs:
    """The gradient g of the parameters p becomes that at p + rho · g / |g|, by the global norm, of the same batch and draws.

    Sharpness-Aware Minimization (Foret et al. 2021, equations 2 and 3). The norm has 1e-12 added, as in the authors' code.
    `update` takes the argument `gradient_at` of `step.train_step`, whose gradient is of the whole batch: all devices and
    microbatches move to the same parameters, while the paper's implementation lets each device move by its own gradient.
    If the second gradient is not finite, the first one is used: a step whose metrics are finite leaves finite parameters.
    """

    def update(gradients: Any, state: Any, params: Any, *, gradient_at: Callable[[Any], Any], **_: Any) -> tuple[Any, Any]:
        scale = rho / (optax.tree.norm(gradients) + 1e-12)
        others = gradient_at(jax.tree.map(lambda leaf, gradient: leaf + scale * gradient, params, gradients))
        finite = jnp.isfinite(optax.tree.norm(others))
        return jax.tree.map(lambda first, second: jnp.where(finite, second, first), gradients, others), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def _layer(path: tuple[Any, ...], blocks: int) -> int:
    """0 for what makes tokens of images, i + 1 for block i, blocks + 1 for what follows the blocks."""
    names = [key.key for key in path]
    for name in names:
        if block := re.fullmatch(r"encoderblock_(\d+)", name):
            return int(block[1]) + 1
    return blocks + 1 if _LAST.intersection(names) else 0


def scale_by_depth(decay: float) -> optax.GradientTransformation:
    """Multiplies updates by decay^(L + 1 - l): l = 0 for the embedding and positions, i + 1 for block i of L, L + 1 after them.

    So the head and the last LayerNorm have the whole rate, the last block decay times it, the embedding decay^(L + 1) times it.
    This is the convention of BEiT (Bao et al. 2022; microsoft/unilm, beit/optim_factory.py: get_num_layer_for_vit,
    LayerDecayValueAssigner). `init` raises ValueError for parameters without blocks.
    """

    def blocks(tree: Any) -> int:
        return max((_layer(path, -1) for path, _ in jax.tree_util.tree_leaves_with_path(tree)), default=0)

    def init(params: Any) -> optax.EmptyState:
        if not blocks(params):
            raise ValueError("layer-wise decay of the learning rate needs parameters of blocks")
        return optax.EmptyState()

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        count = blocks(updates)

        def scaled(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
            return leaf * decay ** (count + 1 - _layer(path, count))

        return jax.tree_util.tree_map_with_path(scaled, updates), state

    return optax.GradientTransformation(init, update)


class Average(NamedTuple):
    """The state of `average`."""

    updates: jax.Array  # int32 [], made so far
    params: Any  # their average; optax.MaskedNode at leaves that are not trained


def average(decay: float) -> optax.GradientTransformation:
    """Keeps the exponential average of the parameters after each update; must be the last of a chain, and changes no update.

    After t updates the average is the sum of (1 - d) d^(t - i) p_i over i = 1 … t, divided by 1 - d^t. So its weights sum to
    one, and the first parameters, which no update made, have none: Adam's correction of the bias (Kingma & Ba 2015,
    section 3), as in optax.ema(debias=True). The decay needs no warm-up: after one update the average is the parameters.
    """

    def init(params: Any) -> Average:
        return Average(jnp.zeros((), jnp.int32), jax.tree.map(jnp.array, params))  # a copy: a step may donate both

    def update(updates: Any, state: Average, params: Any) -> tuple[Any, Average]:
        count = optax.safe_increment(state.updates)
        share = (1 - decay) / -jnp.expm1(count * math.log(decay))  # exact where 1 - d^t is not
        return updates, Average(count, optax.incremental_update(optax.apply_updates(params, updates), state.params, share))

    return optax.GradientTransformation(init, update)


def averaged(params: Any, opt_state: optax.OptState) -> Any:
    """`params` with their averages in place of all leaves that an `average` in the optimizer's state holds."""

    def is_one(node: Any) -> bool:
        return isinstance(node, Average)

    def is_masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    for found in filter(is_one, jax.tree.leaves(opt_state, is_leaf=is_one)):
        params = jax.tree.map(lambda kept, leaf: leaf if is_masked(kept) else kept, found.params, params, is_leaf=is_masked)
    return params
