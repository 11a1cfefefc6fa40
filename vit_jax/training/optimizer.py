"""Learning rates and the optax chain that turns gradients into updates."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from vit_jax.config import Optimizer


def schedule(config: Optimizer, steps: int) -> optax.Schedule:
    """Learning rate of the update after `count` updates, count from 0: linear warm-up from 0, then decay to 0 at `steps`.

    The first update of a warm-up has rate 0, as in the original (its vit_jax/utils.py, create_learning_rate_schedule).
    """
    rate, warmup = config.learning_rate, config.warmup_steps
    if config.decay == "cosine":
        decay = optax.cosine_decay_schedule(rate, steps - warmup)
    else:
        decay = optax.linear_schedule(rate, 0.0, steps - warmup)
    return optax.join_schedules([optax.linear_schedule(0.0, rate, warmup), decay], [warmup]) if warmup else decay


def _kernels(params: Any) -> Any:
    """A tree of booleans: True at the leaves called kernel. Biases, scales, tokens and positions are not decayed."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def build(config: Optimizer, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then SGD with momentum (and L2 decay) or AdamW, then the schedule's rate.

    The momentum is kept in `accumulator_dtype` between steps; the update of a step uses its float32 sum uncast, as
    optax.sgd does in the original.
    """
    rate = schedule(config, steps)
    parts = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    if config.name == "adamw":
        parts += [optax.scale_by_adam(config.momentum, config.b2, mu_dtype=jnp.dtype(config.accumulator_dtype))]
        parts += [optax.add_decayed_weights(config.weight_decay, _kernels)] if config.weight_decay else []
    else:
        parts += [optax.add_decayed_weights(config.weight_decay, _kernels)] if config.weight_decay else []
        parts += [optax.trace(config.momentum, accumulator_dtype=jnp.dtype(config.accumulator_dtype))]
    return optax.chain(*parts, optax.scale_by_learning_rate(rate))
