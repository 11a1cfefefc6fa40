"""The state before the first update."""

import jax
import jax.numpy as jnp
import optax

from vit_jax.config import Optimizer
from vit_jax.training import optimizer as optimizers
from vit_jax.training.state import create

PARAMS = {"head": {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}}


def test_first_state_has_step_zero_and_no_momentum():
    state = create(PARAMS, optimizers.build(Optimizer(), 10))
    assert (state.step.dtype, state.step.shape, int(state.step)) == (jnp.int32, (), 0)
    assert state.params is PARAMS
    trace = optax.tree.get(state.opt_state, "trace")
    assert jax.tree.map(jnp.shape, trace) == jax.tree.map(jnp.shape, PARAMS)
    assert {leaf.dtype for leaf in jax.tree.leaves(trace)} == {jnp.dtype("bfloat16")}
    assert not any(leaf.any() for leaf in jax.tree.leaves(trace))


def test_shapes_of_the_first_state_need_no_arrays():
    optimizer = optimizers.build(Optimizer(), 10)
    abstract, state = jax.eval_shape(lambda: create(PARAMS, optimizer)), create(PARAMS, optimizer)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), abstract) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), state
    )
