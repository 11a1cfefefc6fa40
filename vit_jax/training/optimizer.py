"""Learning rates and the optax chain that turns gradients into updates."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vit_jax.config import Optimizer
from vit_jax.training.transformations import average, sam, scale_by_depth

_BLOCK = 1024  # learning rates that are computed at once
_LINEAR_END = 1e-5  # the end of the original's linear decay (`linear_end`)
_LARS_TRUST = 1e-3  # η of You et al. 2017
_LAMB_EPSILON = 1e-6  # of Adam's denominator, as in the authors' code and optax.lamb
_MUON_RMS = 0.2  # that of AdamW's updates (Liu et al. 2025, section 2.2), so that both parts have one rate and one weight decay


def scaled(config: Optimizer, batch_size: int) -> Optimizer:
    """The same with the peak rate of a batch size, if the rate is given for `base_batch_size`.

    "linear" multiplies it by batch_size / base_batch_size (Goyal et al. 2017, section 2.1), "sqrt" by the root of that
    (Krizhevsky 2014, section 5; Hoffer et al. 2017; You et al. 2020 for LAMB).
    """
    if not config.base_batch_size:
        return config
    factor = batch_size / config.base_batch_size
    factor = math.sqrt(factor) if config.rate_scaling == "sqrt" else factor
    return dataclasses.replace(config, learning_rate=config.learning_rate * factor, base_batch_size=0, rate_scaling="linear")


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
    """A tree of booleans: True at the leaves called kernel, not at biases, scales, tokens and positions."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def _trusted(params: Any) -> Any:
    """The kernels whose updates get a trust ratio: all but the head's.

    A new head is zero, and its ratio would hold it there: its norm could grow only by the factor 1 + rate a step.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel" and path[0].key != "head", params)


def _muon_dimensions(params: Any) -> Any:
    """The matrix that Muon sees in each kernel of a block, [inputs, outputs]; None at leaves that Adam updates.

    Query, key and value [D, heads, K] are [D, heads · K], and out [heads, K, D] is [heads · K, D]: one product of matrices
    each, as layers.Dense computes them. Adam updates the patch embedding and the head, as Jordan et al. 2024 advise for the
    first and the last layer (https://kellerjordan.github.io/posts/muon/), and positions, tokens, biases and scales.
    """

    def dimensions(path: tuple[Any, ...], leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
        names = [key.key for key in path]
        if names[-1] != "kernel" or not any(re.fullmatch(r"encoderblock_\d+", name) for name in names):
            return None
        inputs = leaf.ndim - 1 if names[-2] == "out" else 1
        return optax.contrib.MuonDimensionNumbers(tuple(range(inputs)), tuple(range(inputs, leaf.ndim)))

    return jax.tree_util.tree_map_with_path(dimensions, params)


def build(
    config: Optimizer, steps: int, trainable: Callable[[Any], Any] | None = None
) -> optax.GradientTransformationExtraArgs:
    """Clipping by global norm, then one of the optimizers below, then the decay of rates by depth and the average.

    The momentum is kept in `accumulator_dtype` between steps; the update of a step uses its float32 sum uncast, as
    optax.sgd does in the original.

    | name | updates |
    |---|---|
    | sgd | L2 decay, momentum |
    | adamw | Adam, decay (Loshchilov & Hutter 2019) |
    | lamb | Adam, decay, trust ratio (You et al. 2020) |
    | lars | L2 decay, trust ratio, rate, momentum (You et al. 2017) |
    | muon | momentum made orthogonal, for the kernels of the blocks, Adam for the rest, decay; optax.contrib.muon |

    Decay is of kernels only, and so is the trust ratio, but for the head's. SAM comes before all of it.

    Args:
      config: with the rate of the run's batch size, see `scaled`.
      steps: of the run.
      trainable: of the parameters, makes a tree of booleans; the others are not changed and have no state. None: all are.
    """
    mu_dtype = jnp.dtype(config.accumulator_dtype)
    rate = optax.scale_by_learning_rate(schedule(config, steps))
    decay = [optax.add_decayed_weights(config.weight_decay, _kernels)] if config.weight_decay else []
    trace = optax.trace(config.momentum, accumulator_dtype=mu_dtype)
    adam = functools.partial(optax.scale_by_adam, config.momentum, config.b2, mu_dtype=mu_dtype)
    trust = optax.masked(optax.scale_by_trust_ratio(), _trusted)
    lars_trust = optax.masked(optax.scale_by_trust_ratio(trust_coefficient=_LARS_TRUST), _trusted)
    muon = optax.contrib.muon(
        -1.0,  # which leaves the sign and the rate to `rate`
        beta=config.momentum,
        mu_dtype=mu_dtype,
        adam_b1=config.momentum,
        adam_b2=config.b2,
        muon_weight_dimension_numbers=_muon_dimensions,
        consistent_rms=_MUON_RMS,
    )
    parts = {
        "sgd": [*decay, trace, rate],
        "adamw": [adam(), *decay, rate],
        "lamb": [adam(eps=_LAMB_EPSILON), *decay, trust, rate],
        "lars": [*decay, lars_trust, rate, trace],
        "muon": [muon, *decay, rate],
    }[config.name]
    parts = [optax.clip_by_global_norm(config.clip_norm), *parts] if config.clip_norm else parts
    parts += [scale_by_depth(config.layer_decay)] if config.layer_decay < 1 else []
    parts += [average(config.ema)] if config.ema else []
    optimizer = optax.chain(*parts)
    if trainable:
        kinds = {"trained": optimizer, "frozen": optax.set_to_zero()}
        optimizer = optax.partition(
            kinds, lambda tree: jax.tree.map(lambda is_: "trained" if is_ else "frozen", trainable(tree))
        )
    return optax.chain(sam(config.sam_rho), optimizer) if config.sam_rho else optimizer
