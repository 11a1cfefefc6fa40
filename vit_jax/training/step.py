"""The pure functions of training: one update, and the logits of one batch.

They do not depend on the devices: `devices.Layout` compiles them with jit over a mesh, or with pmap. Only under pmap, `axis`
is the name of the devices' axis. `data` is what stays on the devices for a whole run (see feed.py), or None.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from vit_jax.models.vit import VisionTransformer
from vit_jax.training import losses
from vit_jax.training.state import TrainState
from vit_jax.transforms.keys import AUGMENT, DROPOUT, example_keys, stream

Forward = Callable[..., Any]


class Batch(NamedTuple):
    """A batch of examples, [B] or, for training, [microbatches, B]: their indices in `data`, or images and labels."""

    example_index: Any = None  # int32, positions in the whole batch, which key the augmentation; None in evaluation
    index: Any = None  # int32, positions in `data`; None if the batch holds the images
    images: Any = None  # uint8 [..., H, W, 3]
    labels: Any = None  # int32
    sizes: Any = None  # int32 [..., 2], heights and widths before images were resized; None if they were not


def fetch(batch: Batch, data: Any) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Images uint8 [B, H, W, 3], labels int32 [B] and original sizes (int32 [B, 2] or None) of a batch, inside the step."""
    if data is None:
        return batch.images, batch.labels, batch.sizes
    return data["images"][batch.index], data["labels"][batch.index], data["sizes"][batch.index] if "sizes" in data else None


def loss_of(
    model: VisionTransformer,
    transform: Callable[..., Any],
    seed: int,
    loss: losses.Loss = losses.build(),  # noqa: B008
) -> Forward:
    """forward(params, batch, data, step, dropout_key) → the mean loss of a microbatch, float32 [].

    `transform` is of `preprocess.for_training`, `loss` of `losses.build`. The draws of an image are keyed by the seed, the step
    and the position of the image in the whole batch, so that neither devices nor microbatches change them.
    """

    def forward(params, batch, data, step, dropout_key):
        keys = example_keys(stream(seed, AUGMENT), step, batch.example_index)
        images, labels = transform(keys, *fetch(batch, data))
        logits = model.apply({"params": params}, images, train=True, rngs={"dropout": dropout_key})
        return loss(logits, labels)

    return forward


def logits_of(model: VisionTransformer, transform: Callable[..., Any]) -> Forward:
    """forward(params, batch, data) → logits float32 [B, classes]; `transform` is of `preprocess.for_evaluation`."""

    def forward(params, batch, data):
        images, _, sizes = fetch(batch, data)
        return model.apply({"params": params}, transform(images, sizes))

    return forward


def train_step(
    state: TrainState,
    batch: Batch,
    data: Any,
    *,
    forward: Forward,
    optimizer: optax.GradientTransformation,
    seed: int,
    axis: str | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update from a batch [microbatches, B], over which gradients are averaged.

    Dropout is keyed by the seed, the step, the microbatch and, under pmap, the device. The optimizer is also given
    `gradient_at`, the gradient of the same batch with the same draws as a function of other parameters. One that does not call
    it compiles to the same program.

    Returns:
      The next state and float32 [] metrics: the loss before the update and the norm of its gradient before clipping.
    """
    key = jax.random.fold_in(stream(seed, DROPOUT), state.step)
    if axis:
        key = jax.random.fold_in(key, lax.axis_index(axis))
    microbatches = jax.tree.leaves(batch)[0].shape[0]

    def value_and_grad(params, number):
        microbatch = jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, number, keepdims=False), batch)
        dropout_key = jax.random.fold_in(key, number)
        return jax.value_and_grad(forward)(params, microbatch, data, state.step, dropout_key)

    def mean(params):
        total = value_and_grad(params, 0)
        if microbatches > 1:
            add = functools.partial(jax.tree.map, jnp.add)
            total = lax.fori_loop(1, microbatches, lambda i, sums: add(sums, value_and_grad(params, i)), total)
            total = jax.tree.map(lambda leaf: leaf / microbatches, total)
        return lax.pmean(total, axis) if axis else total

    loss, gradients = mean(state.params)
    update = optax.with_extra_args_support(optimizer).update
    updates, opt_state = update(gradients, state.opt_state, state.params, gradient_at=lambda params: mean(params)[1])
    params = optax.apply_updates(state.params, updates)
    metrics = {"loss": loss, "gradient_norm": optax.tree.norm(gradients)}
    return TrainState(state.step + 1, params, opt_state), metrics
