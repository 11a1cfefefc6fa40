"""The configuration of a run: one typed dataclass tree and the rules it must keep.

Only the training loop and the command lines see a whole `Config`; every other part is handed the section or the values
it needs. Standard library only, so that reading a configuration costs nothing. Field types are what
`ml_collections.config_flags` can override on a command line: no Optional, no Literal; "" and 0 mean "not set".
"""

import dataclasses
import json
import math
import runpy
import types
import typing
from pathlib import Path
from typing import Any

from vit_jax.errors import ConfigError

AUTO = "auto"  # of a field that is settled by what a run finds when it begins, and written out then


@dataclasses.dataclass(slots=True)  # so that a misspelt field of a configuration file is an error
class Model:
    """What is trained."""

    checkpoint: str = ""  # weights to start from: a published name or a file in one of Google's npz forms; "": random weights
    variant: str = ""  # without a checkpoint, a row of vit_jax.models.variants.VARIANTS, such as "B/16"
    keep_head: str = "auto"  # of the checkpoint: "true", "false" (a zero head), or "auto": if its classes have the same names
    dropout: float = 0.0  # after the positions, each MLP layer and the attention's output; in [0, 1)
    attention_dropout: float = 0.0  # on the attention weights; in [0, 1)
    dtype: str = (
        "auto"  # of the computation: "float32", "bfloat16", or "auto": bfloat16 on a GPU; parameters are always float32
    )
    attention: str = "auto"  # what computes it: "xla", "cudnn" (bfloat16 alone), or "auto": cuDNN where a trial run agrees


@dataclasses.dataclass(slots=True)
class Data:
    """What it is trained and tested on."""

    task: str = "cifar100"  # a row of vit_jax.data.tasks.TASKS
    train_split: str = ""  # in TFDS's language, such as "train[:98%]"; "": the task's own
    test_split: str = ""
    image_size: int = 224  # pixels, height and width of what the model sees
    normalization: str = "google"  # "google": to [-1, 1]; "dataset": by the task's channel means and deviations


@dataclasses.dataclass(slots=True)
class Augment:
    """What happens to a training picture before it is resized to the model's size."""

    crop: str = "torchvision"  # the distribution of crop boxes: "torchvision", "tensorflow" or "none"
    crop_area: tuple[float, float] = (0.05, 1.0)  # fractions of the picture's area, least and largest
    flip: bool = True  # left-right, half of the pictures


@dataclasses.dataclass(slots=True)
class Optimizer:
    """How gradients become updates."""

    name: str = "sgd"  # "sgd" with momentum, or "adamw"
    learning_rate: float = 0.03  # the highest of the schedule
    warmup_steps: int = 0  # linear from 0; shorter than the run
    decay: str = "cosine"  # after the warm-up, to 0 at the last step: "cosine" or "linear"
    momentum: float = 0.9  # of SGD, and AdamW's b1
    b2: float = 0.999  # of AdamW
    weight_decay: float = 0.0  # on kernels alone; SGD adds it to the gradient, AdamW to the update
    clip_norm: float = 1.0  # largest global norm of the gradient; 0: not clipped
    accumulator_dtype: str = "bfloat16"  # of the momentum between steps


@dataclasses.dataclass(slots=True)
class Training:
    """How long, how much at a time, and when to look."""

    steps: int = 1000
    batch_size: int = 64  # pictures an update, over all devices
    accumulation: int = 1  # slices a batch is computed in, one after the other
    eval_every: int = 100  # steps between evaluations of the test split; the last step is always evaluated
    save_every: int = 100  # steps between saved states; the last step is always saved


@dataclasses.dataclass(slots=True)
class Run:
    """What does not change the numbers; a run may go on under another."""

    data_dir: str = ""  # where TFDS keeps prepared data; "": $TFDS_DATA_DIR, else ~/tensorflow_datasets
    device_budget_mib: int = 4096  # a split of at most this size lives on every device as uint8; a larger one is streamed
    eval_batch_size: int = 256  # rounded up to what the devices share evenly
    remat: bool = False  # compute each block again for the gradient: a fraction of the memory, a third more time
    parallel: str = "mesh"  # "mesh": jit over a mesh of all local devices; "pmap": the same step under jax.pmap
    expected: dict[str, float] = dataclasses.field(default_factory=dict)  # metric or its description → value to compare with


@dataclasses.dataclass(slots=True)
class Config:
    """One run. A run is a function of this and nothing else."""

    model: Model = dataclasses.field(default_factory=Model)
    data: Data = dataclasses.field(default_factory=Data)
    augment: Augment = dataclasses.field(default_factory=Augment)
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    training: Training = dataclasses.field(default_factory=Training)
    run: Run = dataclasses.field(default_factory=Run)
    seed: int = 0


CHOICES = {
    "model.dtype": (AUTO, "float32", "bfloat16"),
    "model.keep_head": (AUTO, "true", "false"),
    "model.attention": (AUTO, "xla", "cudnn"),
    "data.normalization": ("google", "dataset"),
    "augment.crop": ("torchvision", "tensorflow", "none"),
    "optimizer.name": ("sgd", "adamw"),
    "optimizer.decay": ("cosine", "linear"),
    "optimizer.accumulator_dtype": ("float32", "bfloat16"),
    "run.parallel": ("mesh", "pmap"),
}
_POSITIVE = (
    "data.image_size",
    "optimizer.learning_rate",
    "training.steps",
    "training.batch_size",
    "training.accumulation",
    "training.eval_every",
    "run.eval_batch_size",
    "training.save_every",
)
_NOT_NEGATIVE = ("run.device_budget_mib", "optimizer.warmup_steps", "optimizer.weight_decay", "optimizer.clip_norm", "seed")
_FRACTIONS = ("model.dropout", "model.attention_dropout", "optimizer.momentum", "optimizer.b2")


def fields(node: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Every field of a configuration: dotted name → (value, type), in the order of their definition."""
    found: dict[str, tuple[Any, Any]] = {}
    for field in dataclasses.fields(node):
        value, name = getattr(node, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            found |= fields(value, name + ".")
        else:
            found[name] = (value, field.type)
    return found


def _is_a(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) is tuple:
        kinds = typing.get_args(kind)
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(_is_a, value, kinds))
    if typing.get_origin(kind) is dict:
        return isinstance(value, dict) and all(isinstance(k, str) and _is_a(v, float) for k, v in value.items())
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


def check(config: Config) -> None:
    """Raises ConfigError for a value of the wrong type or out of range, and for fields that contradict each other.

    What needs the data set, the checkpoint or the devices to be seen is checked where those are opened.
    """
    values = {}
    for name, (value, kind) in fields(config).items():
        if not _is_a(value, kind):
            shown = kind.__name__ if isinstance(kind, type) and not isinstance(kind, types.GenericAlias) else kind
            raise ConfigError(f"{name} must be of type {shown}, got {value!r}")
        values[name] = value
    for name, allowed in CHOICES.items():
        if values[name] not in allowed:
            raise ConfigError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {values[name]!r}")
    for name in _POSITIVE:
        if not values[name] > 0:
            raise ConfigError(f"{name} must be above 0, got {values[name]!r}")
    for name in _NOT_NEGATIVE:
        if not values[name] >= 0:
            raise ConfigError(f"{name} must not be negative, got {values[name]!r}")
    if config.seed >= 2**32:
        raise ConfigError(f"seed must be below 2**32, which is what a key is made from, got {config.seed}")
    for name in _FRACTIONS:
        if not 0 <= values[name] < 1:
            raise ConfigError(f"{name} must be in [0, 1), got {values[name]!r}")

    smallest, largest = config.augment.crop_area
    if not 0 < smallest <= largest <= 1:
        raise ConfigError(f"augment.crop_area must be 0 < least <= largest <= 1, got {config.augment.crop_area!r}")
    if bool(config.model.checkpoint) == bool(config.model.variant):
        raise ConfigError(
            "give either model.checkpoint (weights to start from; the architecture is read off them) or model.variant "
            f"(an architecture with random weights), got {config.model.checkpoint!r} and {config.model.variant!r}"
        )
    if config.model.attention == "cudnn":
        if config.model.dtype == "float32":
            raise ConfigError("model.attention = 'cudnn' computes in bfloat16, and model.dtype is 'float32'")
        if config.model.attention_dropout:
            raise ConfigError(
                f"model.attention = 'cudnn' drops no weights, and model.attention_dropout is {config.model.attention_dropout}"
            )
    if config.optimizer.warmup_steps >= config.training.steps:
        raise ConfigError(
            f"optimizer.warmup_steps = {config.optimizer.warmup_steps} must be shorter than the run, "
            f"training.steps = {config.training.steps}"
        )
    if config.training.batch_size % config.training.accumulation:
        raise ConfigError(
            f"training.batch_size = {config.training.batch_size} does not divide into "
            f"training.accumulation = {config.training.accumulation} slices"
        )


def difference(a: Config, b: Config) -> list[str]:
    """Names of fields that differ and change the numbers: all but those of `run`; what is not settled differs from nothing."""
    ours, theirs = fields(a), fields(b)

    def differs(ours: Any, theirs: Any) -> bool:
        return ours != theirs and AUTO not in (ours, theirs)

    return [name for name in ours if not name.startswith("run.") and differs(ours[name][0], theirs[name][0])]


def to_json(config: Config) -> str:
    """The configuration as JSON text, which `from_json` reads back."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str, source: str) -> Config:
    """The configuration that `to_json` wrote; `source` is named in the ConfigError that anything else ends in."""

    def build(kind: Any, values: Any, prefix: str) -> Any:
        if not isinstance(values, dict):
            raise ConfigError(f"{source}: {prefix.rstrip('.') or 'the whole'} should be an object, is {values!r}")
        known = {field.name: field for field in dataclasses.fields(kind)}
        if unknown := sorted(set(values) - set(known)):
            raise ConfigError(f"{source}: there is no field {prefix}{unknown[0]}; there are {', '.join(known)}")
        made = {}
        for name, value in values.items():
            field = known[name]
            if dataclasses.is_dataclass(field.type):
                value = build(field.type, value, f"{prefix}{name}.")
            elif isinstance(value, list):
                value = tuple(value)
            made[name] = value
        return kind(**made)

    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{source} is not JSON: {error}") from None
    return build(Config, values, "")


def split(source: str) -> tuple[str, str]:
    """The file and the argument of "configs/augreg.py:R+Ti/16,pets"; the argument is "" where there is none."""
    if Path(source).is_file():
        return source, ""
    path, _, argument = source.partition(":")
    return path, argument


def read(source: str) -> Config:
    """The configuration of a file: a run's config.json, or a Python file whose get_config() returns a Config.

    What follows a colon is handed to get_config: "configs/augreg.py:R+Ti/16,pets".
    """
    path, argument = split(source)
    if not Path(path).is_file():
        known = ", ".join(sorted(str(p) for p in Path("configs").glob("*.py")))
        raise ConfigError(f"there is no configuration file {path}" + (f"; there are {known}" if known else ""))
    if path.endswith(".json"):
        return from_json(Path(path).read_text(errors="replace"), path)
    try:
        get_config = runpy.run_path(path)["get_config"]
        config = get_config(argument) if argument else get_config()
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{path} gives no configuration: {type(error).__name__}: {error}") from error
    if not isinstance(config, Config):
        raise ConfigError(f"{path}: get_config() returned a {type(config).__name__}, not a vit_jax.Config")
    return config
