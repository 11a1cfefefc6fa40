"""From a configuration to the parts of a run, each of which can be built by hand as it is built here."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vit_jax import runtime
from vit_jax.checkpoints.download import find
from vit_jax.checkpoints.load import architecture, as_checkpoint_error, load, meta_of, model_of_file
from vit_jax.config import AUTO, Config, Model, Optimizer
from vit_jax.config_rules import with_steps
from vit_jax.data import splits
from vit_jax.data.sources import Source
from vit_jax.data.tasks import task
from vit_jax.errors import CheckpointError, ConfigError
from vit_jax.files import sha256
from vit_jax.models.variants import build, from_tree, name_of
from vit_jax.models.vit import GOOGLE_NORMALIZATION, VisionTransformer
from vit_jax.training import optimizer as optimizers
from vit_jax.training import program, restore, tuning
from vit_jax.training.devices import Layout
from vit_jax.training.feed import Feed
from vit_jax.training.state import TrainState, create
from vit_jax.training.transformations import averaged
from vit_jax.transforms.keys import INIT, LORA, stream

_log = logging.getLogger("vit_jax")


@dataclasses.dataclass(frozen=True)
class Parts:
    """The parts of a run."""

    config: Config  # with its automatic fields resolved
    model: VisionTransformer
    params: Any  # the model's parameters to start from; only shapes if they are those of a saved state
    optimizer: optax.GradientTransformation
    rate: Callable[[int], float]  # the learning rate of an update as a function of the updates before it
    layout: Layout
    sources: splits.Splits  # of training, test and, if there is one, validation
    program: program.Program
    meta: dict[str, Any]  # the content of the JSON next to the run's weights
    saved: bool  # whether the model is that of a saved state
    warnings: tuple[str, ...]  # about the data, for the readers of the run's figures

    @functools.cached_property
    def train_feed(self) -> Feed:
        """The training split; read when it is first used."""
        return self._feed(self.sources.train)

    @functools.cached_property
    def test_feed(self) -> Feed:
        """The test split, likewise."""
        return self._feed(self.sources.test)

    @functools.cached_property
    def validation_feed(self) -> Feed | None:
        """The validation split, likewise; None if the run has none."""
        return self._feed(self.sources.validation) if self.sources.validation else None

    def _feed(self, source: Source) -> Feed:
        return Feed(source, self.layout, self.config.run.device_budget_mib * 2**20, self.config.run.data_workers)

    @property
    def chosen_on(self) -> str:
        """The split that chooses the best state: "validation" if there is one, else "test"."""
        return "validation" if self.sources.validation else "test"

    def state(self) -> TrainState:
        """The state before the first update, on the host's default device."""
        return self._create(self.params)

    def abstract(self) -> TrainState:
        """Shapes and types of the state."""
        return jax.eval_shape(self._create, self.params)

    def _create(self, params: Any) -> TrainState:
        key = stream(self.config.seed, LORA)
        return create(tuning.initial(params, self.config.model, key), self.optimizer)

    def weights(self, state: TrainState) -> Any:
        """The model's parameters that a state yields: averaged if the run does so, with adapters merged."""
        return self.program.merge(averaged(state.params, state.opt_state))

    def raw_weights(self, state: TrainState) -> Any:
        """The same without averaging; None if the run does not average."""
        return self.program.merge(state.params) if self.config.optimizer.ema else None

    def describe(self) -> str:
        """One line about the model, its parameters, the data and the devices."""
        data, training, (train, test, validation) = self.config.data, self.config.training, self.sources
        count = tuning.describe(self.abstract().params, self.config.model)
        more = f", {len(validation):,} validation" if validation else ""
        return (
            f"{name_of(self.model) or 'a Vision Transformer'} with {count} at {data.image_size} px; {data.task}: "
            f"{len(train):,} training{more} and {len(test):,} test images; {training.steps:,} steps of {training.batch_size}; "
            f"{self.layout.describe()}"
        )


def assemble(config: Config, layout: Layout, saved: Mapping[str, Any] | None = None) -> Parts:
    """Loads the model, opens the data, compiles nothing yet. Raises their errors, and ConfigError.

    Args:
      config: of the run.
      layout: of its devices.
      saved: the record of a saved state; the model is then the state's, and the checkpoint is not read.
    """
    if not saved:
        _check_rank(config.model)
    row, data = task(config.data.task), config.data
    sources = splits.open_splits(row, data, config.run.data_dir)
    config = with_steps(config, len(sources.train))
    warnings = tuple(splits.warnings(row, data, sources, config.training.batch_size))
    for warning in warnings:
        _log.warning("*** warning: %s ***", warning)
    if saved:
        params: Any = restore.shapes_of(saved)
        model = from_tree(params)
    else:
        keep_head = _keep_head(config, sources.train.num_classes, sources.train.class_names)
        config = _replace_model(config, keep_head="true" if keep_head else "false")
        model, params = _initial_model(config, sources.train.num_classes, keep_head)
    tokens = params["Transformer"]["posembed_input"]["pos_embedding"].shape[1]
    config = dataclasses.replace(config, model=runtime.resolve_auto(config.model, model, tokens))
    model, optimizer, statistics, programs = build_programs(config, model, layout)
    return Parts(
        config=config,
        model=model,
        params=params,
        optimizer=optimizer,
        rate=optimizers.rate_on_host(optimizers.schedule(_optimizer_settings(config), config.training.steps)),
        layout=layout,
        sources=sources,
        program=programs,
        meta=restore.check_data(saved, _describe_weights(config, statistics, sources, saved)),
        saved=saved is not None,
        warnings=warnings,
    )


def build_programs(config: Config, model: VisionTransformer, layout: Layout) -> tuple[VisionTransformer, Any, Any, Any]:
    """A model with the fields of its run, none of them "auto"; the optimizer, the images' statistics, the program.Program."""
    settings, row = config.model, task(config.data.task)
    model = model.clone(dropout=settings.dropout, attention_dropout=settings.attention_dropout, attention=settings.attention)
    model = model.clone(stochastic_depth=settings.stochastic_depth, dtype=jnp.dtype(settings.dtype), remat=config.run.remat)
    if config.data.normalization == "dataset" and not row.mean:
        raise ConfigError(f"data.normalization = 'dataset': the statistics of {row.name} are not known; use 'google'")
    statistics = (row.mean, row.std) if config.data.normalization == "dataset" else GOOGLE_NORMALIZATION
    optimizer = optimizers.build(_optimizer_settings(config), config.training.steps, tuning.mask(settings))
    size, smoothing = config.data.image_size, config.training.label_smoothing
    programs = program.build(model, config.augment, optimizer, layout, config.seed, size, statistics, smoothing, settings)
    return model, optimizer, statistics, programs


def _check_rank(settings: Model) -> None:
    """Raises ConfigError if LoRA's rank is above the width of the model, before anything is downloaded or read."""
    if settings.tune != "lora":
        return
    try:
        model = architecture(settings.checkpoint)[0] if settings.checkpoint else build(settings.variant)
    except ValueError:  # an unknown name or a damaged file, which is reported where the model is loaded
        return
    tuning.check(settings, model)


def _optimizer_settings(config: Config) -> Optimizer:
    """The section `optimizer` with the peak rate of the run's batch size."""
    return optimizers.scaled(config.optimizer, config.training.batch_size)


def _replace_model(config: Config, **fields: Any) -> Config:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **fields))


def _keep_head(config: Config, num_classes: int, class_names: list[str]) -> bool:
    """Whether training starts with the checkpoint's own head: as `model.keep_head` says, or if its classes are the task's."""
    wanted, source = config.model.keep_head, config.model.checkpoint
    if wanted != AUTO or not source:
        return wanted == "true"
    with as_checkpoint_error(source):
        path = find(source)
    if model_of_file(path)[0].num_classes != num_classes:
        return False
    names = meta_of(path).get("class_names")
    if names == class_names:
        _log.warning("the head of %s is kept: it has the same classes", path)
        return True
    difference = f"{num_classes} classes as {config.data.task} has, but {'other' if names else 'no'} names for them"
    _log.warning("the head of %s is replaced by a new one: it has %s; model.keep_head=true keeps it", source, difference)
    return False


def _initial_model(config: Config, num_classes: int, keep_head: bool) -> tuple[VisionTransformer, Any]:
    """The model of `model.checkpoint` or `model.variant` with the parameters that training starts from."""
    settings, size = config.model, config.data.image_size
    try:
        if settings.checkpoint:
            model, params = load(settings.checkpoint, None if keep_head else num_classes, size)
        else:
            model = build(settings.variant, num_classes=num_classes)
            init = jax.jit(lambda key: model.init(key, jnp.zeros((1, size, size, 3)))["params"])
            params = init(stream(config.seed, INIT))
    except CheckpointError:
        raise
    except ValueError as error:
        variant = "" if settings.checkpoint else f"model.variant = {settings.variant!r}, "
        raise ConfigError(f"{variant}data.image_size = {size}: {error}") from None
    if model.num_classes != num_classes:
        raise ConfigError(
            f"{settings.checkpoint} has a head of {model.num_classes} classes, {config.data.task} has {num_classes}: "
            "give a fine-tuned checkpoint, or train first"
        )
    return model, params


def _describe_weights(config: Config, statistics: Any, sources: splits.Splits, saved: Any) -> dict[str, Any]:
    """What a reader of the run's weights must know: how images are prepared, class names, task, source and its hash.

    The source of a saved state is what its record says, because the file may have changed since.
    """
    mean, std = statistics
    meta = {
        "normalization": {"mean": list(mean), "std": list(std)},
        "image_size": config.data.image_size,
        "eval_crop": config.augment.eval_crop,
        "class_names": sources.train.class_names,
        "task": config.data.task,
        "images_sha256": [source.digest for source in sources if source and source.digest],
        "source": f"random weights, {config.model.variant}",
    }
    if saved:
        meta |= {name: value for name, value in saved["meta"].items() if name in ("source", "source_sha256")}
    elif config.model.checkpoint:
        path = find(config.model.checkpoint)
        meta |= {"source": path.name, "source_sha256": sha256(path)}
    return meta
