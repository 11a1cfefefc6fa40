"""From a configuration to the parts of a run, each of which can be built by hand as it is built here."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vit_jax import runtime
from vit_jax.checkpoints.download import find
from vit_jax.checkpoints.load import as_checkpoint_error, load, meta_of, model_of_file
from vit_jax.config import AUTO, Config
from vit_jax.data.prepare import prepare
from vit_jax.data.sources import Source, open_split, shared_examples
from vit_jax.data.tasks import Task, find_prepared, task
from vit_jax.errors import CheckpointError, ConfigError
from vit_jax.files import sha256
from vit_jax.models.variants import build, from_tree, name_of
from vit_jax.models.vit import GOOGLE_NORMALIZATION, VisionTransformer
from vit_jax.training import optimizer as optimizers
from vit_jax.training import restore
from vit_jax.training.devices import Layout
from vit_jax.training.feed import Feed
from vit_jax.training.state import TrainState, create
from vit_jax.training.step import INIT, logits_of, loss_of, stream, train_step
from vit_jax.transforms.preprocess import for_evaluation, for_training

_log = logging.getLogger("vit_jax")
_BLOCK = 1024  # learning rates computed at once


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a run is made of."""

    config: Config  # with its automatic fields resolved
    model: VisionTransformer
    params: Any  # the parameters to start from; shapes only, if they are those of a saved state
    optimizer: optax.GradientTransformation
    rate: Callable[[int], float]  # the learning rate of an update, the first of which is 0
    layout: Layout
    sources: tuple[Source, Source]  # of training and test
    budget: int  # bytes of a split that lives on the devices
    step: Any  # (state, batch, data) → (state, metrics), compiled
    predict: Any  # (params, batch, data) → logits, compiled
    meta: dict[str, Any]  # what the JSON next to the run's weights says of them
    saved: bool  # whether the model is that of a saved state
    warnings: tuple[str, ...]  # about the data, for whoever reads the run's figures

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
        return jax.eval_shape(lambda params: create(params, self.optimizer), self.params)

    def describe(self) -> str:
        """Model, parameters, data and devices in a line."""
        model, data = self.model, self.config.data
        count = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        return (
            f"{name_of(model) or 'a Vision Transformer'} with {count:,} parameters at {data.image_size} px; {data.task}: "
            f"{len(self.sources[0]):,} training and {len(self.sources[1]):,} test images; {self.layout.describe()}"
        )


def _statistics(config: Config, row: Task) -> tuple[Any, Any] | None:
    return (row.mean, row.std) if config.data.normalization == "dataset" else None


def _keeps_head(config: Config, num_classes: int, class_names: list[str]) -> bool:
    """Whether training starts with the checkpoint's own head: `model.keep_head`, or because its classes are the task's."""
    wanted, source = config.model.keep_head, config.model.checkpoint
    if wanted != AUTO or not source:
        return wanted == "true"
    with as_checkpoint_error(source):
        path = find(source)
    model, _ = model_of_file(path)
    if model.num_classes != num_classes:
        return False
    names = meta_of(path).get("class_names")
    if names == class_names:
        _log.warning("the head of %s is kept: it has the same classes", path)
        return True
    _log.warning(
        "the head of %s is replaced by a new one: it has %d classes as %s has, but %s; model.keep_head=true keeps it",
        source,
        num_classes,
        config.data.task,
        "other names for them" if names else "no names for them",
    )
    return False


def _model(config: Config, num_classes: int, own_head: bool) -> tuple[VisionTransformer, Any]:
    settings, size = config.model, config.data.image_size
    if settings.checkpoint:
        try:
            model, params = load(settings.checkpoint, None if own_head else num_classes, size)
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
        model = build(settings.variant, num_classes=num_classes)
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


def _warnings(config: Config, sources: tuple[Source, Source]) -> tuple[str, ...]:
    """What a reader of the run's figures must know about its data."""
    found, (train, test) = [], sources
    if shared := shared_examples(train, test):
        row = task(config.data.task)
        found.append(
            f"{shared:,} of the {len(test):,} test images are training images too "
            f"(data.train_split = {config.data.train_split or row.train_split!r}, "
            f"data.test_split = {config.data.test_split or row.test_split!r}): "
            "the test accuracy does not say how the model does on new images"
        )
    if config.training.batch_size > len(train):
        found.append(
            f"training.batch_size = {config.training.batch_size} is larger than the training split of {len(train):,} images: "
            "every batch holds images more than once"
        )
    return tuple(found)


def describe(config: Config, class_names: list[str], saved: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a reader of the run's weights must know: normalisation, image size, class names, task, source and its hash.

    The source of a saved state is what its record says, because the file may have changed since.
    """
    row = task(config.data.task)
    mean, std = _statistics(config, row) or GOOGLE_NORMALIZATION
    meta = {
        "normalization": {"mean": list(mean), "std": list(std)},
        "image_size": config.data.image_size,
        "class_names": class_names,
        "task": config.data.task,
        "source": f"random weights, {config.model.variant}",
    }
    if saved:
        meta |= {name: value for name, value in saved["meta"].items() if name in ("source", "source_sha256")}
    elif config.model.checkpoint:
        path = find(config.model.checkpoint)
        meta |= {"source": path.name, "source_sha256": sha256(path)}
    return meta


def _rate(schedule: optax.Schedule) -> Callable[[int], float]:
    """The schedule as a function of a step on the host."""

    @functools.lru_cache(2)
    def block(number: int) -> np.ndarray:
        with jax.transfer_guard("allow"):
            return np.asarray(jax.vmap(schedule)(jnp.arange(number * _BLOCK, (number + 1) * _BLOCK)))

    return lambda step: float(block(step // _BLOCK)[step % _BLOCK])


def assemble(config: Config, layout: Layout, saved: Mapping[str, Any] | None = None) -> Parts:
    """Loads the model, opens the data, compiles nothing yet. Raises what those raise, and ConfigError.

    Args:
      config: of the run.
      layout: of its devices.
      saved: the record of a saved state; the model is then the state's, and the checkpoint is not read.
    """
    row, sources = task(config.data.task), splits(config)
    for warning in (warnings := _warnings(config, sources)):
        _log.warning("*** warning: %s ***", warning)
    if saved:
        params: Any = restore.shapes_of(saved)
        model = from_tree(params)
    else:
        own_head = _keeps_head(config, row.num_classes, sources[0].class_names)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, keep_head="true" if own_head else "false"))
        model, params = _model(config, row.num_classes, own_head)
    tokens = params["Transformer"]["posembed_input"]["pos_embedding"].shape[1]
    config = dataclasses.replace(config, model=runtime.resolve_auto(config.model, model, tokens))
    model = model.clone(
        dropout=config.model.dropout,
        attention_dropout=config.model.attention_dropout,
        dtype=jnp.dtype(config.model.dtype),
        attention=config.model.attention,
        remat=config.run.remat,
    )
    statistics, size = _statistics(config, row), config.data.image_size
    optimizer = optimizers.build(config.optimizer, config.training.steps)
    forward = loss_of(model, for_training(config.augment, size, statistics), config.seed)
    return Parts(
        config=config,
        model=model,
        params=params,
        optimizer=optimizer,
        rate=_rate(optimizers.schedule(config.optimizer, config.training.steps)),
        layout=layout,
        sources=sources,
        budget=config.run.device_budget_mib * 2**20,
        step=layout.train(functools.partial(train_step, forward=forward, optimizer=optimizer, seed=config.seed)),
        predict=layout.evaluate(logits_of(model, for_evaluation(size, statistics))),
        meta=describe(config, sources[0].class_names, saved),
        saved=saved is not None,
        warnings=warnings,
    )
