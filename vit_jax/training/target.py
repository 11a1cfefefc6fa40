"""`--dry_run --target CARD`: the programs of a run, compiled on any machine for graphics cards that are only described.

XLA compiles as it would on the cards, but tunes nothing, because that needs measurements. The plug-in of JAX for CUDA is
needed, no GPU and no library of NVIDIA's. Neither weights nor data are read, only their shapes.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from vit_jax.checkpoints.download import find
from vit_jax.checkpoints.load import model_of_file
from vit_jax.config import AUTO, Config, Model
from vit_jax.config_rules import with_steps
from vit_jax.data.sources import stored_shape
from vit_jax.data.splits import names, open_splits
from vit_jax.data.tasks import Task, examples, task
from vit_jax.errors import ConfigError, printable
from vit_jax.models.variants import build, shapes
from vit_jax.models.vit import VisionTransformer
from vit_jax.training import hlo
from vit_jax.training.assemble import build_programs
from vit_jax.training.cards import CUDNN, Card
from vit_jax.training.devices import Layout
from vit_jax.training.state import TrainState, create
from vit_jax.training.step import Batch
from vit_jax.training.tuning import check, initial, model_tree
from vit_jax.transforms.keys import LORA, stream

_PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin")
# Without a card XLA cannot compare its own products with cuBLASLt's, and takes its own with a default tile. A run takes the
# faster ones, for which cuBLASLt's are the better estimate.
_OPTIONS = {"xla_gpu_enable_triton_gemm": False}


def check_plugin() -> None:
    """Raises ConfigError unless the CUDA plug-in of the installed JAX is there, too."""
    found = {}
    for name in _PLUGINS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    wanted = jax.__version__
    if wanted in found.values():
        return
    name, version = next(iter(found.items()), (_PLUGINS[0], ""))
    command = f'pip install "jax[{name.split("-")[1]}-local]=={wanted}"'
    if version:
        raise ConfigError(f"--target needs a plug-in of JAX's version: {name} is {version}, jax is {wanted}; {command}")
    raise ConfigError(f'--target needs the CUDA plug-in of JAX, but no GPU: pip install "vit_jax[aot]", or {command}')


@contextlib.contextmanager
def described(chosen: Card, count: int) -> Iterator[list[Any]]:
    """`count` devices of a card, for which programs can be compiled while this lasts.

    JAX must not have used a GPU in this process: from here on it runs on the CPU, because the plug-in starts without a driver
    only if JAX does not look for GPUs.
    """
    from jax._src.cudnn import fused_attention_stablehlo as cudnn
    from jax.experimental import topologies

    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_platforms", "cpu")
    before, caches = cudnn.check_cudnn_version, jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    # A program for a device that is not there can be neither loaded nor kept.
    jax.config.update("jax_enable_compilation_cache", False)
    # JAX asks the library of cuDNN, which need not be there, for its version and has no public way to say it.
    cudnn.check_cudnn_version = lambda: CUDNN[0] * 10_000 + CUDNN[1] * 100
    try:
        found = topologies.get_topology_desc(platform="cuda", target_config=chosen.proto(), topology=f"1x1x{count}")
        yield list(found.devices)
    finally:
        cudnn.check_cudnn_version = before
        jax.config.update("jax_enable_compilation_cache", caches)


def _base_model(config: Config, row: Task) -> VisionTransformer:
    """The architecture of a run with its head; of weights in a file only the shapes are read."""
    settings, size = config.model, config.data.image_size
    if settings.checkpoint:
        model, tree = model_of_file(find(settings.checkpoint))
        classes = tree["head"]["kernel"].shape[-1] if "head" in tree else 0
        if settings.keep_head == "true" and classes != row.num_classes:
            raise ConfigError(f"{settings.checkpoint} has a head of {classes} classes, {row.name} has {row.num_classes}")
        if settings.keep_head != "true":
            model = model.clone(num_classes=row.num_classes, representation_size=0)
    else:
        try:
            model = build(settings.variant, num_classes=row.num_classes)
        except ValueError as error:
            raise ConfigError(f"model.variant = {settings.variant!r}: {error}") from None
    if size % model.stride:
        raise ConfigError(f"data.image_size = {size} does not divide into patches: take a multiple of {model.stride}")
    return model


def resolve_auto(settings: Model, model: VisionTransformer) -> Model:
    """Replaces "auto" in `dtype` and `attention` as a run on a GPU does whose cuDNN passes the trial."""
    dtype = "bfloat16" if settings.dtype == AUTO else settings.dtype
    attention = settings.attention
    if attention == AUTO:
        width = model.hidden_size // model.num_heads
        cudnn = dtype == "bfloat16" and not settings.attention_dropout and width % 8 == 0 and width <= 128
        attention = "cudnn" if cudnn else "xla"
    return dataclasses.replace(settings, dtype=dtype, attention=attention)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A compiled program and XLA's plan of its memory, in bytes on each card."""

    text: str
    arguments: int
    temporary: int  # with the results that take no argument's place

    @functools.cached_property
    def module(self) -> hlo.Module:
        """The computations of the program."""
        return hlo.parse(self.text)

    @functools.cached_property
    def kernels(self) -> list[hlo.Kernel]:
        """The kernels that a run of the program starts."""
        return list(hlo.kernels(self.module))


class Target:
    """A run on described cards: its model, the sizes of its data, and its programs, compiled when they are asked for."""

    def __init__(self, config: Config, devices: list[Any]):
        """`config` is checked, and has no published weights as a checkpoint that are not on this machine."""
        self.layout, self.resized = Layout("mesh", devices, config.run.mesh, config.run.deterministic), False
        row = task(config.data.task)
        chosen = names(row, config.data)
        splits = {"training": chosen.train, "validation": chosen.validation, "test": chosen.test}
        # Of each split that the run has, at most; 0 if the table does not know it.
        self.images = {kind: examples(row, split) for kind, split in splits.items() if split}
        if not row.num_classes:  # it is found in the data
            sources = open_splits(row, config.data, config.run.data_dir)
            row = dataclasses.replace(row, num_classes=sources.train.num_classes, image_shape=sources.train.image_shape)
            opened = {"training": sources.train, "validation": sources.validation, "test": sources.test}
            self.images = {kind: len(source) for kind, source in opened.items() if source}
            self.resized = sources.train.resized
        elif not row.image_shape:
            row, self.resized = dataclasses.replace(row, image_shape=stored_shape(None, config.data.image_size)), True
        if config.training.epochs and not self.images["training"]:
            raise ConfigError(f"training.epochs: the number of images of {row.name} is not known; give training.steps")
        config = with_steps(config, self.images["training"])
        config = dataclasses.replace(config, training=dataclasses.replace(config.training, epochs=0.0))  # for other batch sizes
        self.row, model = row, _base_model(config, row)
        check(config.model, model)
        self.config = dataclasses.replace(config, model=resolve_auto(config.model, model))
        self.model, self.optimizer, _, self.programs = build_programs(self.config, model, self.layout)
        self.data = {kind: self._data(number) for kind, number in self.images.items()}  # on the devices; None if streamed
        params = shapes(model, config.data.image_size)
        self.state = self.layout.abstract(jax.eval_shape(self._create, params))
        self.eval_batch_size = self.layout.round_up(min(config.run.eval_batch_size, self.images["test"] or 2**30))

    def _create(self, params: Any) -> TrainState:
        return create(initial(params, self.config.model, stream(self.config.seed, LORA)), self.optimizer)

    def _data(self, number: int) -> Any:
        """What lies on the devices of a split with so many images; None if it is streamed."""
        images = jax.ShapeDtypeStruct((number, *self.row.image_shape), np.uint8)
        if not number or images.size > self.config.run.device_budget_mib * 2**20:
            return None
        data = {"images": images, "labels": jax.ShapeDtypeStruct((number,), np.int32)}
        sizes = {"sizes": jax.ShapeDtypeStruct((number, 2), np.int32)} if self.resized else {}
        return self.layout.abstract_data(data | sizes)

    def _batch(self, shape: tuple[int, ...], resident: bool, train: bool) -> Batch:
        index = jax.ShapeDtypeStruct(shape, np.int32)
        images = jax.ShapeDtypeStruct((*shape, *self.row.image_shape), np.uint8)
        sizes = jax.ShapeDtypeStruct((*shape, 2), np.int32) if self.resized else None
        batch = Batch(index=index) if resident else Batch(images=images, labels=index, sizes=sizes)
        return self.layout.abstract_batch(batch._replace(example_index=index if train else None), axis=len(shape) - 1)

    def _compile(self, program: Callable[..., Any], *arguments: Any) -> Plan:
        compiled = program.lower(*arguments).compile(compiler_options=_OPTIONS)  # type: ignore[attr-defined]
        sizes = compiled.memory_analysis()
        temporary = sizes.temp_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
        return Plan(compiled.as_text(), sizes.argument_size_in_bytes, temporary)

    def train_step(self) -> Plan:
        """The training step; NotImplementedError if JAX refuses cuDNN's attention for this model."""
        settings = self.config.training
        shape = (settings.grad_accum_steps, settings.batch_size // settings.grad_accum_steps)
        batch = self._batch(shape, self.data["training"] is not None, train=True)
        return self._compile(self.programs.train_step, self.state, batch, self.data["training"])

    def predict(self) -> Plan:
        """The logits of an evaluation batch of the test split."""
        batch = self._batch((self.eval_batch_size,), self.data["test"] is not None, train=False)
        return self._compile(self.programs.predict, model_tree(self.state.params), batch, self.data["test"])

    def changed(self, **fields: Any) -> "Target":
        """The same run with other values of fields, named as in train_batch_size or run_remat."""
        config = self.config
        for name, value in fields.items():
            section, _, field = name.partition("_")
            config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **{field: value})})
        return Target(config, self.layout.devices)


def usable(chosen: Card) -> float:
    """Bytes of a card that JAX takes, as XLA_PYTHON_CLIENT_MEM_FRACTION says or three quarters."""
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        if text := os.environ.get(name):
            try:
                return float(text) * chosen.memory
            except ValueError:
                raise ConfigError(f"{name} = {printable(text, 40)!r} must be a fraction of a card's memory") from None
    return 0.75 * chosen.memory
