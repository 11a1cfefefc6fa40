"""`--dry_run`: the shapes of a run, its memory by XLA's own analysis, and its time from a step and an evaluation batch."""

import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax

from vit_jax.checkpoints.catalogue import resolve
from vit_jax.checkpoints.download import local
from vit_jax.config import AUTO, Config
from vit_jax.config_rules import check, mixing_fields
from vit_jax.errors import CheckpointError
from vit_jax.models.variants import flops
from vit_jax.models.vit import VisionTransformer
from vit_jax.training import devices, tuning
from vit_jax.training.assemble import Parts, assemble
from vit_jax.training.devices import nbytes
from vit_jax.training.feed import Feed
from vit_jax.training.state import TrainState

_Split = TypeVar("_Split")
_LONG = 20.0  # seconds of a first call, set-up included, above which one measurement is exact enough


def duration(seconds: float) -> str:
    """A time in the units people use: "0.25 s", "3 min 20 s", "5 h 12 min", "6 days 1 hour"."""
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 3600:
        return f"{round(seconds) // 60} min {round(seconds) % 60} s"
    if hours < 24:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{hours // 24} day{'s' * (hours >= 48)} {hours % 24} hour{'s' * (hours % 24 != 1)}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def without_download(config: Config) -> Config:
    """The configuration, with random weights of the same shapes for a published file that is not on this machine."""
    name = config.model.checkpoint
    try:
        if not name or Path(name).expanduser().exists():
            return config
        row = resolve(name)
    except (CheckpointError, OSError, RuntimeError):  # `assemble` says what is wrong with it
        return config
    if local(row):
        return config
    _say(f"{name} is not on this machine: random weights of the same shapes ({row.variant}) are used")
    model = dataclasses.replace(config.model, checkpoint="", variant=row.variant, keep_head=AUTO)
    return dataclasses.replace(config, model=model)


def _seconds(act: Callable[[], Any]) -> float:
    """Seconds that `act` takes: of one call if it is long, else of the shortest of three."""
    times: list[float] = []
    while len(times) < 3 and (not times or min(times) < _LONG):
        began = time.perf_counter()
        jax.block_until_ready(act())
        times.append(time.perf_counter() - began)
    return min(times)


def _feeds(parts: Parts) -> dict[str, Feed]:
    """The splits that a run has, by the name of their images."""
    feeds = {"training": parts.train_feed, "validation": parts.validation_feed, "test": parts.test_feed}
    return {kind: feed for kind, feed in feeds.items() if feed}


def _measure(config: Config, parts: Parts) -> tuple[Any, float, dict[str, float]]:
    """XLA's memory analysis of a training step, its seconds, and those of a pass over each split that is evaluated."""
    settings, layout = config.training, parts.layout
    state = layout.put(parts.state())
    batches = parts.train_feed.train(settings.batch_size, settings.grad_accum_steps, config.seed, 0)
    batch, data = next(batches), parts.train_feed.data
    _say(f"compiling a training step of {settings.batch_size} images and measuring it")
    compiled = parts.program.train_step.lower(state, batch, data).compile()

    def step() -> Any:
        nonlocal state
        state, measured = compiled(state, batch, data)
        return measured

    seconds = _seconds(step)
    images, test, weights = min(config.run.eval_batch_size, len(parts.test_feed)), parts.test_feed, parts.weights(state)
    if seconds > _LONG:  # then the time per image hardly depends on the batch size
        images = min(images, settings.batch_size)
    size = layout.round_up(images)
    _say(f"compiling an evaluation of {size} images and measuring it")
    examples, _, _ = next(iter(test.evaluation(size)))
    predict = parts.program.predict
    if layout.pmap:
        jax.block_until_ready(predict(weights, examples, test.data))
    else:
        predict = predict.lower(weights, examples, test.data).compile()
    once = _seconds(lambda: predict(weights, examples, test.data)) * evaluations_of_a_state(config)
    passes = {kind: once * -(-len(feed) // size) for kind, feed in evaluated(_feeds(parts)).items()}
    return compiled.memory_analysis(), seconds, passes


def evaluations_of_a_state(config: Config) -> int:
    """How many parameters an evaluation measures: those that a state yields and, if these are averaged, the raw ones."""
    return 2 if config.optimizer.ema else 1


def training_flops(config: Config, model: VisionTransformer) -> int:
    """Floating-point operations of the products for one training image, counted as by `variants.flops`, at most.

    The backward pass computes two products for each of the forward pass. It ends at the head if only that is trained. SAM
    computes both passes twice.
    """
    passes = 1 if config.model.tune == "head" else 3
    return passes * (2 if config.optimizer.sam_rho else 1) * flops(model, config.data.image_size)


def evaluated(splits: dict[str, _Split]) -> dict[str, _Split]:
    """The splits that are evaluated: all but the training split."""
    return {kind: split for kind, split in splits.items() if kind != "training"}


def evaluation_time(passes: dict[str, float], evaluations: int) -> tuple[float, float]:
    """Seconds of an evaluation during training, and of all evaluations of a run, from those of a pass over each split.

    With a validation split, the test split is only evaluated at the end: the last parameters and the best.
    """
    if "validation" in passes:
        return passes["validation"], evaluations * passes["validation"] + 2 * passes["test"]
    return passes["test"], evaluations * passes["test"]


def describe_images(numbers: dict[str, str], data: dict[str, Any]) -> str:
    """How many images each split has, and where they lie: `data` has None for a split that is streamed."""
    *first, last = (f"{number} {kind}" for kind, number in numbers.items())
    resident = [kind for kind, images in data.items() if images is not None]
    where = "on the device" if resident else "streamed"
    if 0 < len(resident) < len(data):
        where = f"{' and '.join(resident)} on the device, the rest streamed"
    return f"{', '.join(first)} and {last} images, {where}"


def describe_shapes(
    config: Config, model: VisionTransformer, state: TrainState, images: str, layout: devices.Layout
) -> list[str]:
    """The lines about the model, the data and the batch of a run; `images` says how many there are and where they lie."""
    settings, size = config.training, config.data.image_size
    tokens = (size // model.stride) ** 2 + (model.classifier == "token")
    count = tuning.describe(state.params, config.model)
    return [
        f"model       {model.num_layers} blocks of {model.hidden_size}, {model.num_heads} heads, {tokens} tokens, "
        f"{count}, {model.num_classes} classes",
        f"data        {config.data.task}: {images}",
        f"batch       {settings.batch_size} images of {size}×{size}×3 in {settings.grad_accum_steps} microbatch(es) over "
        f"{layout.describe()}",
        f"sharding    {layout.describe_sharding(state)}",
    ]


def preview(config: Config) -> str:
    """Describes the run of a configuration as text; progress is printed on standard error.

    Touches no working directory and downloads no published weights; prepares the data if they are not there. The memory is
    that of a training step; the other splits and the best parameters come on top.
    """
    check(config)
    layout = devices.start(config.run)
    layout.check(config.training.batch_size, config.training.grad_accum_steps, mixing_fields(config.augment))
    parts = assemble(without_download(config), layout)
    settings = parts.config.training  # with the steps of training.epochs
    memory, step, passes = _measure(config, parts)
    evaluations = -(-settings.steps // settings.eval_every)
    evaluation, evaluating = evaluation_time(passes, evaluations)
    training, feeds = settings.steps * step, _feeds(parts)
    data = {kind: feed.data for kind, feed in feeds.items()}
    images = describe_images({kind: f"{len(feed):,}" for kind, feed in feeds.items()}, data)
    needed = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    others, best = {kind: nbytes(split) for kind, split in evaluated(data).items()}, nbytes(layout.abstract(parts.params))
    lines = [
        *describe_shapes(config, parts.model, parts.abstract(), images, layout),
        f"memory      {sum(needed) / 2**20:,.0f} MiB a device for a step "
        f"({needed[0] / 2**20:,.0f} of state and data, {needed[1] / 2**20:,.0f} temporary)",
        f"            {(sum(needed) + sum(others.values()) + best) / 2**20:,.0f} with "
        + ", ".join(f"the {kind} images ({bytes_ / 2**20:,.0f})" for kind, bytes_ in others.items())
        + f" and the best parameters ({best / 2**20:,.0f})",
        f"step        {duration(step)}, {settings.batch_size / step:,.1f} images/s",
        f"evaluation  {duration(evaluation)}, {evaluations:,} of them: {duration(evaluating)}",
        f"run         {settings.steps:,} steps, about {duration(training + evaluating)}",
    ]
    if evaluating > training:
        lines.append(
            f"warning: evaluation takes longer than training ({duration(evaluating)} and {duration(training)}); "
            f"training.eval_every = {settings.eval_every} can be raised"
        )
    return "\n".join(lines)
