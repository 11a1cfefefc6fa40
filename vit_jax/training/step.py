"""The pure functions of training: one update, and the logits of one batch.

They know no device. `devices.Layout` lays jit over a mesh or pmap on from outside; under pmap alone, `axis` names the
devices' axis. Batches are dicts; `data` is what lies on the device for a whole run (see feed.py), or None.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from vit_jax.models.vit import VisionTransformer
from vit_jax.training.feed import fetch
from vit_jax.training.state import TrainState
from vit_jax.transforms.preprocess import example_keys

Forward = Callable[..., Any]

INIT, AUGMENT, DROPOUT = range(3)  # the kinds of draws of a run, each with a key of its own


def stream(seed: int, kind: int) -> jax.Array:
    """The key of one kind of draw, so that no draw of one kind repeats one of another.

    Threefry, whose draws are equal in every layout. Called inside the step: a key closed over would be an array to move.
    """
    return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), kind)


def loss_of(model: VisionTransformer, transform: Callable[..., Any], seed: int) -> Forward:
    """forward(params, data, batch, step, dropout_key) → mean cross-entropy of a slice of a batch, float32 [].

    `transform` is of transforms.for_training; each image's draws are keyed by the seed, the step and the image's
    place in the whole batch, so that neither devices nor slices change them.
    """

    def forward(params, data, batch, step, dropout_key):
        images, labels = fetch(data, batch)
        images, labels = transform(example_keys(stream(seed, AUGMENT), step, batch["place"]), images, labels)
        logits = model.apply({"params": params}, images, train=True, rngs={"dropout": dropout_key})
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    return forward


def logits_of(model: VisionTransformer, transform: Callable[..., Any]) -> Forward:
    """forward(params, batch, data) → logits float32 [B, classes]; `transform` is of transforms.for_evaluation."""

    def forward(params, batch, data):
        images, _ = fetch(data, batch)
        return model.apply({"params": params}, transform(images))

    return forward


def train_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    data: Any,
    *,
    forward: Forward,
    optimizer: optax.GradientTransformation,
    seed: int,
    axis: str | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update from a batch whose leaves are [slices, size, …]; gradients are averaged over the slices.

    Dropout is keyed by the seed, the step, the device under pmap, and the slice. Returns
    the next state and float32 [] metrics: the loss before the update and the norm of its gradient before clipping.
    """
    key = jax.random.fold_in(stream(seed, DROPOUT), state.step)
    if axis:
        key = jax.random.fold_in(key, lax.axis_index(axis))
    slices = jax.tree.leaves(batch)[0].shape[0]

    def value_and_grad(number):
        piece = jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, number, keepdims=False), batch)
        dropout_key = jax.random.fold_in(key, number)
        return jax.value_and_grad(forward)(state.params, data, piece, state.step, dropout_key)

    total = value_and_grad(0)
    if slices > 1:
        total = lax.fori_loop(1, slices, lambda i, sums: jax.tree.map(jnp.add, sums, value_and_grad(i)), total)
        total = jax.tree.map(lambda leaf: leaf / slices, total)
    loss, gradients = lax.pmean(total, axis) if axis else total

    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {"loss": loss, "gradient_norm": optax.tree.norm(gradients)}
    return TrainState(state.step + 1, params, opt_state), metrics
