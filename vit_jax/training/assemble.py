"""From a configuration to the parts of a run, each of which can be built by hand as it is built here."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vit_jax.checkpoints.download import find
from vit_jax.checkpoints.load import load
from vit_jax.config import Config
from vit_jax.data.prepare import prepare
from vit_jax.data.sources import Source, open_split
from vit_jax.data.tasks import Task, task
from vit_jax.errors import CheckpointError, ConfigError
from vit_jax.files import sha256
from vit_jax.models.variants import build
from vit_jax.models.vit import VisionTransformer
from vit_jax.training import devices
from vit_jax.training import optimizer as optimizers
from vit_jax.training.devices import Layout
from vit_jax.training.feed import Feed
from vit_jax.training.state import TrainState, create
from vit_jax.training.step import INIT, logits_of, loss_of, stream, train_step
from vit_jax.transforms.preprocess import for_evaluation, for_training


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a run is made of."""

    config: Config  # with what was left open settled
    model: VisionTransformer
    params: Any  # the parameters to start from
    optimizer: optax.GradientTransformation
    rates: np.ndarray  # float32 [steps], the learning rate of each update
    layout: Layout
    sources: tuple[Source, Source]  # of training and test
    budget: int  # bytes of a split that lives on the devices
    step: Any  # (state, batch, data) → (state, metrics), compiled
    predict: Any  # (params, batch, data) → logits, compiled
    meta: dict[str, Any]  # what the JSON beside the run's weights says of them

    @functools.cached_property
    def train_feed(self) -> Feed:
        """The training split; read when first asked for."""
        return Feed(self.sources[0], self.layout, self.budget)

    @functools.cached_property
    def test_feed(self) -> Feed:
        """The test split."""
        return Feed(self.sources[1], self.layout, self.budget)

    def state(self) -> TrainState:
        """The state before the first update, on the host's default device."""
        return create(self.params, self.optimizer)

    def abstract(self) -> TrainState:
        """Shapes and types of the state."""
        return jax.eval_shape(self.state)


def _statistics(config: Config, row: Task) -> tuple[Any, Any] | None:
    return (row.mean, row.std) if config.data.normalization == "dataset" else None


def _model(config: Config, num_classes: int, own_head: bool) -> tuple[VisionTransformer, Any]:
    settings, size = config.model, config.data.image_size
    fields: dict[str, Any] = dict(dropout=settings.dropout, attention_dropout=settings.attention_dropout)
    if settings.checkpoint:
        try:
            model, params = load(settings.checkpoint, None if own_head else num_classes, size, **fields)
        except CheckpointError:
            raise
        except ValueError as error:
            raise ConfigError(f"data.image_size = {size}: {error}") from None
        if model.num_classes != num_classes:
            raise ConfigError(
                f"{settings.checkpoint} has a head of {model.num_classes} classes, {config.data.task} has {num_classes}: "
                "give a fine-tuned checkpoint, or train first"
            )
        return model, params
    try:
        model = build(settings.variant, num_classes=num_classes, **fields)
        params = jax.jit(lambda key: model.init(key, jnp.zeros((1, size, size, 3)))["params"])(stream(config.seed, INIT))
    except ValueError as error:
        raise ConfigError(f"model.variant = {settings.variant!r}, data.image_size = {size}: {error}") from None
    return model, params


def splits(config: Config) -> tuple[Source, Source]:
    """The training and the test split of a configuration's task, prepared first where they are not."""
    row = task(config.data.task)
    try:
        prepare(row, data_dir=config.run.data_dir)
    except OSError as error:  # no permission
        raise ConfigError(f"run.data_dir = {config.run.data_dir!r}: {row.name} cannot be had there ({error})") from None
    return (
        open_split(row, config.data.train_split or row.train_split, config.run.data_dir),
        open_split(row, config.data.test_split or row.test_split, config.run.data_dir),
    )


def describe(config: Config, class_names: list[str]) -> dict[str, Any]:
    """What a reader of the run's weights must know: normalisation, image size, class names, task, source and its hash."""
    row = task(config.data.task)
    mean, std = _statistics(config, row) or ((0.5,) * 3, (0.5,) * 3)
    meta = {
        "normalization": {"mean": list(mean), "std": list(std)},
        "image_size": config.data.image_size,
        "class_names": class_names,
        "task": config.data.task,
        "source": config.model.checkpoint or f"random weights, {config.model.variant}",
    }
    if config.model.checkpoint:
        path: Path = find(config.model.checkpoint)
        meta |= {"source": path.name, "source_sha256": sha256(path)}
    return meta


def assemble(config: Config, layout: Layout, own_head: bool = False) -> Parts:
    """Loads the model, opens the data, compiles nothing yet. Raises what those raise, and ConfigError.

    The model begins with a fresh head, or with the checkpoint's where `own_head`.
    """
    row, sources = task(config.data.task), splits(config)
    model, params = _model(config, row.num_classes, own_head)
    tokens = params["Transformer"]["posembed_input"]["pos_embedding"].shape[1]
    config = dataclasses.replace(config, model=devices.settle(config.model, model, tokens))
    model = model.clone(dtype=jnp.dtype(config.model.dtype), attention=config.model.attention, remat=config.run.remat)
    statistics, size = _statistics(config, row), config.data.image_size
    optimizer = optimizers.build(config.optimizer, config.training.steps)
    rate = optimizers.schedule(config.optimizer, config.training.steps)
    forward = loss_of(model, for_training(config.augment, size, statistics), config.seed)
    return Parts(
        config=config,
        model=model,
        params=params,
        optimizer=optimizer,
        rates=np.asarray(jax.vmap(rate)(jnp.arange(config.training.steps))),
        layout=layout,
        sources=sources,
        budget=config.run.device_budget_mib * 2**20,
        step=layout.train(functools.partial(train_step, forward=forward, optimizer=optimizer, seed=config.seed)),
        predict=layout.evaluate(logits_of(model, for_evaluation(size, statistics))),
        meta=describe(config, sources[0].class_names),
    )
