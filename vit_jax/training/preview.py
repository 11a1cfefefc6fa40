"""`--dry_run`: the shapes of a run, its memory by XLA's own analysis, and its time from a step and an evaluation batch."""

import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from vit_jax.checkpoints.catalogue import resolve
from vit_jax.checkpoints.download import local
from vit_jax.config import AUTO, Config, check
from vit_jax.errors import CheckpointError
from vit_jax.models.vit import VisionTransformer
from vit_jax.training import devices
from vit_jax.training.assemble import Parts, assemble

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


def _measure(config: Config, parts: Parts) -> tuple[Any, float, float]:
    """XLA's memory analysis of a training step, its seconds, and those of one evaluation of the test split."""
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
    images, test = min(config.run.eval_batch_size, len(parts.test_feed)), parts.test_feed
    if seconds > _LONG:  # then the time per image hardly depends on the batch size
        images = min(images, settings.batch_size)
    size = layout.round_up(images)
    _say(f"compiling an evaluation of {size} images and measuring it")
    examples, _, _ = next(iter(test.evaluation(size)))
    predict = parts.program.predict
    if layout.pmap:
        jax.block_until_ready(predict(state.params, examples, test.data))
    else:
        predict = predict.lower(state.params, examples, test.data).compile()
    once = _seconds(lambda: predict(state.params, examples, test.data))
    return compiled.memory_analysis(), seconds, once * -(-len(test) // size)


def describe_shapes(config: Config, model: VisionTransformer, params: Any, images: str, layout: devices.Layout) -> list[str]:
    """The lines about the model, the data and the batch of a run; `images` says how many there are and where they lie."""
    settings, size = config.training, config.data.image_size
    tokens = (size // model.stride) ** 2 + (model.classifier == "token")
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    return [
        f"model       {model.num_layers} blocks of {model.hidden_size}, {model.num_heads} heads, {tokens} tokens, "
        f"{count:,} parameters, {model.num_classes} classes",
        f"data        {config.data.task}: {images}",
        f"batch       {settings.batch_size} images of {size}×{size}×3 in {settings.grad_accum_steps} microbatch(es) over "
        f"{layout.describe()}",
    ]


def preview(config: Config) -> str:
    """Describes the run of a configuration as text; progress is printed on standard error.

    Touches no working directory and downloads no published weights; prepares the data if they are not there. The memory is
    that of a training step; the test split and the best parameters come on top.
    """
    check(config)
    layout = devices.start(config.run)
    layout.check(config.training.batch_size, config.training.grad_accum_steps)
    parts = assemble(without_download(config), layout)
    settings = parts.config.training  # with the steps of training.epochs
    memory, step, evaluation = _measure(config, parts)
    evaluations = -(-settings.steps // settings.eval_every)
    training, evaluating = settings.steps * step, evaluations * evaluation
    where = "on the device" if parts.train_feed.data is not None else "streamed"
    images = f"{len(parts.train_feed):,} training and {len(parts.test_feed):,} test images, {where}"
    needed = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    lines = [
        *describe_shapes(config, parts.model, parts.params, images, layout),
        f"memory      {sum(needed) / 2**20:,.0f} MiB a device for a step "
        f"({needed[0] / 2**20:,.0f} of state and data, {needed[1] / 2**20:,.0f} temporary)",
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
