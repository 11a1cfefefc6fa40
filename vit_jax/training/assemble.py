"""From a configuration to the parts of a run, each of which can be built by hand as it is built here."""

import dataclasses
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vit_jax.checkpoints.download import find
from vit_jax.checkpoints.google import read_meta
from vit_jax.checkpoints.load import load, meta_of
from vit_jax.config import AUTO, Config, Model
from vit_jax.data.prepare import prepare
from vit_jax.data.sources import Source, open_split, shared_examples
from vit_jax.data.tasks import Task, find_prepared, task
from vit_jax.errors import CheckpointError, ConfigError
from vit_jax.files import sha256
from vit_jax.models.variants import build, name_of
from vit_jax.models.vit import VisionTransformer
from vit_jax.training import devices
from vit_jax.training import optimizer as optimizers
from vit_jax.training.devices import Layout
from vit_jax.training.feed import Feed
from vit_jax.training.state import TrainState, create
from vit_jax.training.step import INIT, logits_of, loss_of, stream, train_step
from vit_jax.transforms.preprocess import for_evaluation, for_training

_log = logging.getLogger("vit_jax")
_RATES = 1024  # learning rates that are computed at a time


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a run is made of."""

    config: Config  # with what was left open settled
    model: VisionTransformer
    params: Any  # the parameters to start from
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule  # updates made so far → learning rate of the next
    layout: Layout
    sources: tuple[Source, Source]  # of training and test
    budget: int  # bytes of a split that lives on the devices
    step: Any  # (state, batch, data) → (state, metrics), compiled
    predict: Any  # (params, batch, data) → logits, compiled
    meta: dict[str, Any]  # what the JSON next to the run's weights says of them
    warnings: tuple[str, ...]  # about the run, for its console and its page

    @functools.cached_property
    def train_feed(self) -> Feed:
        """The training split; read when first asked for."""
        return Feed(self.sources[0], self.layout, self.budget)

    @functools.cached_property
    def test_feed(self) -> Feed:
        """The test split."""
        return Feed(self.sources[1], self.layout, self.budget)

    def rate(self, count: int) -> float:
        """The learning rate of the update after `count` updates."""
        first = count - count % _RATES
        return float(self._rates(first)[count - first])

    @functools.cached_property
    def _rates(self) -> Callable[[int], np.ndarray]:
        """A part of the schedule, float32 [_RATES], from a step on: a whole one of a long run would fill the memory."""
        several = jax.jit(lambda first: jax.vmap(self.schedule)(first + jnp.arange(_RATES)))
        return functools.lru_cache(1)(lambda first: jax.device_get(several(jax.device_put(np.int32(first)))))

    def describe(self) -> str:
        """Model, parameters, data and devices in a line."""
        model, data = self.model, self.config.data
        count = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        return (
            f"{name_of(model) or 'a Vision Transformer'} with {count:,} parameters at {data.image_size} px; {data.task}: "
            f"{len(self.sources[0]):,} training and {len(self.sources[1]):,} test images; {self.layout.describe()}"
        )

    def state(self) -> TrainState:
        """The state before the first update, on the host's default device."""
        return create(self.params, self.optimizer)

    def abstract(self) -> TrainState:
        """Shapes and types of the state."""
        return jax.eval_shape(self.state)


def _statistics(config: Config, row: Task) -> tuple[Any, Any] | None:
    return (row.mean, row.std) if config.data.normalization == "dataset" else None


def _keeps_head(settings: Model, class_names: list[str]) -> str:
    """`model.keep_head` as "true" or "false": "auto" keeps the head of a checkpoint whose classes have the run's names."""
    if not settings.checkpoint or settings.keep_head != AUTO:
        return "false" if settings.keep_head == AUTO else settings.keep_head
    path = find(settings.checkpoint)
    names = meta_of(path).get("class_names")
    if names == class_names:
        _log.warning("the head of %s is kept: it has the same classes", path)
        return "true"
    if isinstance(names, list) and sorted(map(str, names)) == sorted(class_names):
        _log.warning("the head of %s is replaced by a zero head: its classes are in another order", path)
    return "false"


def _model(config: Config, num_classes: int, instead: Path | None) -> tuple[VisionTransformer, Any]:
    settings, size = config.model, config.data.image_size
    fields: dict[str, Any] = dict(dropout=settings.dropout, attention_dropout=settings.attention_dropout)
    if settings.checkpoint:
        try:
            model, params = load(settings.checkpoint, None if settings.keep_head == "true" else num_classes, size, **fields)
        except CheckpointError:
            if instead is None or not instead.exists():
                raise
            # A finished run needs its checkpoint no more: the architecture is that of its own weights.
            model, params = load(instead, None, size, **fields)
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
    row, data_dir = task(config.data.task), config.run.data_dir
    if row.data_dir and not find_prepared(row, data_dir):  # data that come with the package are there in any case
        data_dir = ""
    try:
        prepare(row, data_dir=data_dir)
    except OSError as error:  # no permission
        raise ConfigError(f"run.data_dir = {data_dir!r}: {row.name} cannot be had there ({error})") from None
    return (
        open_split(row, config.data.train_split or row.train_split, data_dir),
        open_split(row, config.data.test_split or row.test_split, data_dir),
    )


def describe(config: Config, class_names: list[str], instead: Path | None = None) -> dict[str, Any]:
    """What a reader of the run's weights must know: normalisation, image size, class names, task, source and its hash.

    If the checkpoint is gone, what the JSON next to `instead`, the weights of the finished run, says.
    """
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
        try:
            path = find(config.model.checkpoint)
        except CheckpointError:
            if instead is None or not instead.exists():
                raise
            return read_meta(instead) or meta
        meta |= {"source": path.name, "source_sha256": sha256(path)}
    return meta


def _warnings(config: Config, sources: tuple[Source, Source]) -> tuple[str, ...]:
    """What a run does that its user may not want; each is logged, too."""
    found = []
    if common := shared_examples(*sources):
        found.append(
            f"{common:,} of the {len(sources[1]):,} test images are training images as well (data.train_split, "
            "data.test_split): the test figures are not those of unseen images"
        )
    if config.training.batch_size > len(sources[0]):
        found.append(
            f"training.batch_size = {config.training.batch_size} is larger than the {len(sources[0]):,} training images: a "
            "batch holds images more than once"
        )
    for text in found:
        _log.warning("warning: %s", text)
    return tuple(found)


def assemble(config: Config, layout: Layout, instead: Path | None = None) -> Parts:
    """Loads the model, opens the data, compiles nothing yet. Raises what those raise, and ConfigError.

    `instead` is a file of weights of the same architecture to use if the checkpoint is gone.
    """
    row, sources = task(config.data.task), splits(config)
    keep_head = _keeps_head(config.model, sources[0].class_names)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, keep_head=keep_head))
    model, params = _model(config, row.num_classes, instead)
    tokens = params["Transformer"]["posembed_input"]["pos_embedding"].shape[1]
    config = dataclasses.replace(config, model=devices.settle(config.model, model, tokens))
    model = model.clone(dtype=jnp.dtype(config.model.dtype), attention=config.model.attention, remat=config.run.remat)
    statistics, size = _statistics(config, row), config.data.image_size
    optimizer = optimizers.build(config.optimizer, config.training.steps)
    forward = loss_of(model, for_training(config.augment, size, statistics), config.seed)
    return Parts(
        config=config,
        model=model,
        params=params,
        optimizer=optimizer,
        schedule=optimizers.schedule(config.optimizer, config.training.steps),
        layout=layout,
        sources=sources,
        budget=config.run.device_budget_mib * 2**20,
        step=layout.train(functools.partial(train_step, forward=forward, optimizer=optimizer, seed=config.seed)),
        predict=layout.evaluate(logits_of(model, for_evaluation(size, statistics))),
        meta=describe(config, sources[0].class_names, instead),
        warnings=_warnings(config, sources),
    )
