"""Learning rates and the optax chain that turns gradients into updates."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vit_jax.config import Optimizer

_BLOCK = 1024  # learning rates that are computed at once
_LINEAR_END = 1e-5  # the end of the original's linear decay (`linear_end`)


def schedule(config: Optimizer, steps: int) -> optax.Schedule:
    """The learning rate as a function of the number of updates made before: of 0 for the first, of steps - 1 for the last.

    It rises linearly from 0 during the warm-up, so with a warm-up the first update has rate 0. Then it falls, and would
    reach its end at the count `steps`, to which no update belongs: with T updates of which w are warm-up, the last update has
    the rate learning_rate · (1 + cos(π (T - w - 1) / (T - w))) / 2 by "cosine", which ends at 0, and
    1e-5 + (learning_rate - 1e-5) / (T - w) by "linear", which ends at 1e-5, or at learning_rate if that is smaller.

    Both are the original's (google-research/vision_transformer, vit_jax/utils.py, create_learning_rate_schedule); only a
    learning_rate below 1e-5 would rise there.
    """
    rate, warmup = config.learning_rate, config.warmup_steps
    if config.decay == "cosine":
        decay = optax.cosine_decay_schedule(rate, steps - warmup)
    else:
        decay = optax.linear_schedule(rate, min(rate, _LINEAR_END), steps - warmup)
    return optax.join_schedules([optax.linear_schedule(0.0, rate, warmup), decay], [warmup]) if warmup else decay


def rate_on_host(rate: optax.Schedule) -> Callable[[int], float]:
    """A schedule as a function on the host, which computes a block of rates at once."""

    @functools.lru_cache(2)
    def block(number: int) -> np.ndarray:
        with jax.transfer_guard("allow"):
            return np.asarray(jax.vmap(rate)(jnp.arange(number * _BLOCK, (number + 1) * _BLOCK)))

    return lambda step: float(block(step // _BLOCK)[step % _BLOCK])


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
