"""The state of a training: everything that changes from one step to the next."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class TrainState(NamedTuple):
    """The argument and result of a step; a run is restored from it."""

    step: jax.Array  # int32 [], updates made so far
    params: Any
    opt_state: optax.OptState


def create(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first update."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
