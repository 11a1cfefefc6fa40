"""The compiled programs of a run, for the loop, the preview and the benchmarks alike."""

import functools
from typing import Any, NamedTuple

import optax

from vit_jax.config import Augment, Model
from vit_jax.models.vit import VisionTransformer
from vit_jax.training import losses, tuning
from vit_jax.training.devices import Layout
from vit_jax.training.step import logits_of, loss_of, train_step
from vit_jax.transforms.preprocess import Statistics, for_evaluation, for_training


class Program(NamedTuple):
    """Compiled when first called; a batch is a `step.Batch` on the devices, `data` is the `data` of its Feed."""

    train_step: Any  # (state, batch, data) → (state, metrics); the state given is used up
    predict: Any  # (params, batch, data) → logits float32 [B, classes]
    merge: Any  # parameters of a state → the model's; without adapters the same arrays, with them a copy of the whole model


def build(
    model: VisionTransformer,
    augment: Augment,
    optimizer: optax.GradientTransformation,
    layout: Layout,
    seed: int,
    image_size: int,
    statistics: Statistics | None = None,
    label_smoothing: float = 0.0,
    settings: Model | None = None,
) -> Program:
    """The programs of a model on the devices of a layout.

    Args:
      model: with the dtype, attention and dropout of the run.
      augment: what happens to an image.
      optimizer: which turns gradients into updates.
      layout: of the devices.
      seed: of every random draw.
      image_size: height and width of the model's input in pixels.
      statistics: channel means and deviations that images are scaled by; None: Google's.
      label_smoothing: of the training loss.
      settings: what is trained, see tuning.py; None: all parameters.
    """
    settings, plain = settings or Model(), tuning.plain
    transform = for_training(augment, image_size, statistics, model.num_classes)
    loss = loss_of(model, transform, seed, losses.build(label_smoothing))
    forward = layout.gathered(lambda params, *rest: loss(plain(params, settings), *rest))
    merge = layout.convert(lambda params: plain(params, settings)) if tuning.has_adapters(settings) else tuning.model_tree
    return Program(
        train_step=layout.train(functools.partial(train_step, forward=forward, optimizer=optimizer, seed=seed)),
        predict=layout.evaluate(logits_of(model, for_evaluation(image_size, statistics, augment.eval_crop))),
        merge=merge,
    )
