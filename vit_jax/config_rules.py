"""The rules that a configuration must keep, checked before anything is loaded."""

import dataclasses
import math
import types
import typing
from typing import Any

from vit_jax.config import AUTO, Augment, Config, fields, mesh_sizes, shown
from vit_jax.errors import ConfigError

CHOICES = {
    "model.dtype": (AUTO, "float32", "bfloat16"),
    "model.keep_head": (AUTO, "true", "false"),
    "model.attention": (AUTO, "xla", "cudnn"),
    "model.tune": ("all", "head", "attention", "frozen_embedding", "lora", "ssf"),
    "data.normalization": ("google", "dataset"),
    "data.on_error": ("raise", "skip"),
    "augment.crop": ("torchvision", "tensorflow", "resize_crop", "pad", "none"),
    "augment.eval_crop": ("none", "center"),
    "optimizer.name": ("sgd", "adamw", "lamb", "lars", "muon"),
    "optimizer.rate_scaling": ("linear", "sqrt"),
    "optimizer.decay": ("cosine", "linear"),
    "optimizer.accumulator_dtype": ("float32", "bfloat16"),
    "training.on_nan": ("raise", "rollback"),
    "run.parallel": ("mesh", "pmap"),
}
_INT32 = 2**31 - 1  # a larger number overflows on a device
_LIMITS: dict[str, tuple[float, float]] = {  # smallest and largest value
    "data.image_size": (1, 4096),
    "augment.padding": (0, 128),
    "augment.randaugment_layers": (0, 10),
    "augment.randaugment_magnitude": (0, 30),  # beyond, shears and rotations leave little of an image
    "augment.erasing": (0, 1),
    "augment.mixup": (0, 100),
    "augment.cutmix": (0, 100),
    "training.steps": (1, 10**8),
    "training.epochs": (0, 1e6),
    "training.patience": (0, _INT32),
    "training.batch_size": (1, 2**17),
    "training.grad_accum_steps": (1, 2**17),
    "training.eval_every": (1, _INT32),
    "training.save_every": (1, _INT32),
    "run.eval_batch_size": (1, 2**17),
    "run.device_budget_mib": (0, _INT32),
    "run.data_workers": (-1, 1024),
    "run.watchdog_minutes": (0, 1e6),
    "optimizer.warmup_steps": (0, _INT32),
    "optimizer.learning_rate": (1e-30, 1e6),
    "optimizer.weight_decay": (0, 1e6),
    "optimizer.clip_norm": (0, 1e9),
    "optimizer.base_batch_size": (0, 2**17),
    "optimizer.layer_decay": (1e-3, 1),
    "optimizer.sam_rho": (0, 1e6),
    "model.lora_rank": (1, 2**16),
    "model.lora_alpha": (0, 1e6),
    "seed": (0, 2**32 - 1),  # what a JAX key is made from
}
_LEAST_ALPHA = 1e-3  # of the beta distribution; its draws in float32 are not finite for much smaller ones
_FRACTIONS = (
    "model.dropout",
    "model.attention_dropout",
    "model.stochastic_depth",
    "optimizer.momentum",
    "optimizer.b2",
    "optimizer.ema",
    "training.label_smoothing",
)


def _is_a(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) is tuple:
        kinds = typing.get_args(kind)
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(_is_a, value, kinds))
    if typing.get_origin(kind) is dict:
        return isinstance(value, dict) and all(isinstance(k, str) and _is_a(v, float) for k, v in value.items())
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e38  # also false for NaN
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


def check(config: Config) -> None:
    """Raises ConfigError if a value has the wrong type or is out of range, and if fields contradict each other.

    Checks that need the data set, the checkpoint or the devices are made when those are opened.
    """
    _check_values(config)
    smallest, largest = config.augment.crop_area
    if not 0 < smallest <= largest <= 1:
        raise ConfigError(f"augment.crop_area must be 0 < least <= largest <= 1, got {config.augment.crop_area!r}")
    if bool(config.model.checkpoint) == bool(config.model.variant):
        raise ConfigError(
            "give either model.checkpoint (weights to start from; the architecture is read off them) or model.variant "
            f"(an architecture with random weights), got {shown(config.model.checkpoint)} and {shown(config.model.variant)}"
        )
    if config.model.keep_head == "true" and not config.model.checkpoint:
        raise ConfigError("model.keep_head = 'true' needs model.checkpoint, which has a head to keep")
    if config.model.attention == "cudnn":
        if config.model.dtype == "float32":
            raise ConfigError("model.attention = 'cudnn' computes in bfloat16, and model.dtype is 'float32'")
        if dropout := config.model.attention_dropout:
            raise ConfigError(f"model.attention = 'cudnn' drops no weights, and model.attention_dropout is {dropout}")
    _check_tuning(config)
    if mesh_sizes(config.run.mesh) and config.run.parallel == "pmap":
        raise ConfigError(f"run.mesh = {config.run.mesh!r} needs run.parallel = 'mesh', and run.parallel is 'pmap'")
    if (patience := config.training.patience) and not config.data.validation_split:
        raise ConfigError(f"training.patience = {patience} needs data.validation_split: test images must not say when to stop")
    if config.optimizer.warmup_steps >= config.training.steps and not config.training.epochs:
        raise ConfigError(
            f"optimizer.warmup_steps = {config.optimizer.warmup_steps} must be shorter than the run, "
            f"training.steps = {config.training.steps}"
        )
    if config.run.deterministic and config.run.parallel == "pmap":
        raise ConfigError("run.deterministic = true needs run.parallel = 'mesh': pmap takes no options of the compiler")
    if config.training.batch_size % config.training.grad_accum_steps:
        raise ConfigError(
            f"training.batch_size = {config.training.batch_size} does not divide into "
            f"training.grad_accum_steps = {config.training.grad_accum_steps} microbatches"
        )
    for name, value in (("augment.mixup", config.augment.mixup), ("augment.cutmix", config.augment.cutmix)):
        if 0 < value < _LEAST_ALPHA:
            raise ConfigError(f"{name} must be 0 (off) or at least {_LEAST_ALPHA:g}, got {value:g}")
    if (mixing := mixing_fields(config.augment)) and config.training.batch_size // config.training.grad_accum_steps % 2:
        raise ConfigError(
            f"{mixing} mixes pairs of images: training.batch_size = {config.training.batch_size} in "
            f"training.grad_accum_steps = {config.training.grad_accum_steps} must give an even number in each microbatch"
        )


def _check_values(config: Config) -> None:
    """Raises ConfigError if a value has the wrong type or is out of range."""
    for section in dataclasses.fields(config):
        value, kind = getattr(config, section.name), section.type
        if isinstance(kind, type) and dataclasses.is_dataclass(kind) and type(value) is not kind:
            raise ConfigError(f"{section.name} must be a vit_jax.config.{kind.__name__}, got {shown(value)}")
    values = {}
    for name, (value, kind) in fields(config).items():
        if not _is_a(value, kind):
            expected = kind.__name__ if isinstance(kind, type) and not isinstance(kind, types.GenericAlias) else kind
            raise ConfigError(f"{name} must be of type {expected}, got {shown(value)}")
        if isinstance(value, str) and "\0" in value:
            raise ConfigError(f"{name} must not contain a NUL character, got {shown(value)}")
        values[name] = value
    for name, allowed in CHOICES.items():
        if values[name] not in allowed:
            raise ConfigError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {shown(values[name])}")
    for name, (least, most) in _LIMITS.items():
        if not least <= values[name] <= most:
            raise ConfigError(f"{name} must be from {least:,} to {most:,}, got {shown(values[name])}")
    for name in _FRACTIONS:
        if not 0 <= values[name] < 1:
            raise ConfigError(f"{name} must be in [0, 1), got {shown(values[name])}")


def mixing_fields(augment: Augment) -> str:
    """The fields that mix pairs of images, with their values, as an error names them; "" if none does."""
    fields = {"augment.mixup": augment.mixup, "augment.cutmix": augment.cutmix}
    return " and ".join(f"{name} = {value:g}" for name, value in fields.items() if value)


def _check_tuning(config: Config) -> None:
    """Raises ConfigError if fields of the optimizer and of what is trained contradict each other."""
    model, optimizer = config.model, config.optimizer
    if optimizer.rate_scaling != "linear" and not optimizer.base_batch_size:
        raise ConfigError(
            f"optimizer.rate_scaling = {optimizer.rate_scaling!r} needs optimizer.base_batch_size, the batch size that "
            f"optimizer.learning_rate = {optimizer.learning_rate:g} is for, and it is 0"
        )
    if optimizer.layer_decay < 1 and model.tune == "head":
        raise ConfigError(
            f"optimizer.layer_decay = {optimizer.layer_decay:g} needs blocks to train, and model.tune = 'head' trains none"
        )
    if model.lora_alpha and model.tune != "lora":
        raise ConfigError(
            f"model.lora_alpha = {model.lora_alpha:g} needs model.tune = 'lora', and model.tune is {model.tune!r}"
        )


def with_steps(config: Config, images: int) -> Config:
    """The configuration with `training.steps` for `training.epochs` passes over so many training images, if it asks for that.

    Raises:
      ConfigError: if these are too many steps, or fewer than `optimizer.warmup_steps`.
    """
    epochs = config.training.epochs
    if not epochs:
        return config
    steps = math.ceil(round(epochs * images, 6) / config.training.batch_size)
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=steps, epochs=0.0))
    try:
        check(config)
    except ConfigError as error:
        raise ConfigError(f"training.epochs = {epochs:g} passes over {images:,} images: {error}") from None
    return dataclasses.replace(config, training=dataclasses.replace(config.training, epochs=epochs))
