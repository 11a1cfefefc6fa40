"""Small states of a training, and functions that save and restore them."""

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.config import Config, Optimizer
from vit_jax.training import optimizer as optimizers
from vit_jax.training import restore
from vit_jax.training.saving import Saver
from vit_jax.training.state import TrainState, create

PARAMS = {"head": {"kernel": np.arange(6, dtype=np.float32).reshape(3, 2), "bias": np.zeros(2, np.float32)}}


OPTIMIZER = optimizers.build(Optimizer(), 10)  # bfloat16 momentum among the leaves


def state_at(step: int) -> TrainState:
    """A state that is all `step`, on the host."""
    state = create(jax.tree.map(jnp.asarray, PARAMS), OPTIMIZER)
    return jax.tree.map(lambda leaf: np.full(leaf.shape, step, leaf.dtype), state)


ABSTRACT = jax.eval_shape(lambda: create(PARAMS, OPTIMIZER))


def same(a, b) -> bool:
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def saved(workdir, steps=(1, 2, 3), best_at=1):
    with Saver(workdir, {"task": "t"}, Config()) as saver:
        for step in steps:
            saver.update_best(step, 0.9 if step == best_at else 0.1, state_at(step).params)
            saver.save(state_at(step))


def restored(workdir):
    with Saver(workdir, {}, Config()) as saver:
        return saver.restore(ABSTRACT), saver.best


def read_state(workdir):
    saved = restore.read_newest(workdir / "checkpoints", ABSTRACT, Config())
    return saved and saved.state
