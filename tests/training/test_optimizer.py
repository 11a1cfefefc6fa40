"""Learning rates and updates, compared with the original and with arithmetic by hand."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax.config import Optimizer
from vit_jax.training import optimizer as optimizers


def sgd(gradient, settings, params, state):
    """One update by hand, in NumPy: clip, decay of kernels, momentum."""
    norm = np.sqrt(sum(np.square(leaf).sum() for leaf in gradient.values()))
    scale = min(1.0, settings.clip_norm / norm) if settings.clip_norm else 1.0
    for name in params:
        decay = settings.weight_decay * params[name] if name.endswith("kernel") else 0
        state[name] = settings.momentum * state[name] + scale * gradient[name] + decay
        params[name] = params[name] - settings.learning_rate * state[name]


def adamw(gradient, settings, params, state, count):
    for name in params:
        first, second = state.setdefault((name, 1), 0.0), state.setdefault((name, 2), 0.0)
        state[name, 1] = first = settings.momentum * first + (1 - settings.momentum) * gradient[name]
        state[name, 2] = second = settings.b2 * second + (1 - settings.b2) * gradient[name] ** 2
        step = (first / (1 - settings.momentum**count)) / (np.sqrt(second / (1 - settings.b2**count)) + 1e-8)
        decay = settings.weight_decay * params[name] if name.endswith("kernel") else 0
        params[name] = params[name] - settings.learning_rate * (step + decay)


@pytest.mark.parametrize(
    "settings",
    [
        Optimizer(momentum=0.8, clip_norm=0.5, weight_decay=0.1),
        Optimizer(momentum=0.5, clip_norm=0.0),
        Optimizer(name="adamw", momentum=0.7, b2=0.8, clip_norm=0.0, weight_decay=0.2),
    ],
)
def test_updates_agree_with_hand_computation(settings):
    settings.accumulator_dtype = "float32"
    settings.decay, settings.learning_rate = "linear", 0.05
    steps = 10**9  # so long that the rate does not move
    draw = np.random.default_rng(0)
    params = {"a/kernel": draw.normal(size=(3, 2)), "a/bias": draw.normal(size=2)}
    optimizer = optimizers.build(settings, steps)
    tree = unflatten_dict({k: jnp.asarray(v, jnp.float32) for k, v in params.items()}, sep="/")
    state, ours = optimizer.init(tree), dict.fromkeys(params, 0.0)
    for count in range(1, 4):
        gradient = {name: draw.normal(size=leaf.shape) for name, leaf in params.items()}
        updates, state = optimizer.update(
            unflatten_dict({k: jnp.asarray(v, jnp.float32) for k, v in gradient.items()}, sep="/"), state, tree
        )
        tree = optax.apply_updates(tree, updates)
        if settings.name == "sgd":
            sgd(gradient, settings, params, ours)
        else:
            adamw(gradient, settings, params, ours, count)
        for name, leaf in flatten_dict(tree, sep="/").items():
            np.testing.assert_allclose(leaf, params[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("decay", ["cosine", "linear"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_schedule_equals_the_original(decay, warmup):
    """create_learning_rate_schedule of its vit_jax/utils.py, whose linear decay ends at 1e-5."""
    rate = optimizers.schedule(Optimizer(learning_rate=0.5, warmup_steps=warmup, decay=decay), 11)
    for count in range(12):
        progress = np.clip((count - warmup) / (11 - warmup), 0, 1)
        decayed = 0.5 * (1 + np.cos(np.pi * progress)) / 2 if decay == "cosine" else 1e-5 + (0.5 - 1e-5) * (1 - progress)
        expected = decayed * (min(1, count / warmup) if warmup else 1)
        np.testing.assert_allclose(rate(count), expected, rtol=1e-6, atol=1e-7)


def test_schedule_of_the_last_update_is_as_documented():
    """T = 11 updates, w = 3 of them warm-up; a rate below 1e-5 does not rise."""
    of = {
        decay: optimizers.schedule(Optimizer(learning_rate=0.5, warmup_steps=3, decay=decay), 11)
        for decay in ("cosine", "linear")
    }
    assert of["cosine"](10) == pytest.approx(0.5 * (1 + np.cos(np.pi * 7 / 8)) / 2, rel=1e-5)
    assert of["linear"](10) == pytest.approx(1e-5 + (0.5 - 1e-5) / 8, rel=1e-5)
    small = optimizers.schedule(Optimizer(learning_rate=1e-6, decay="linear"), 10)
    assert small(0) == small(9) == pytest.approx(1e-6)
