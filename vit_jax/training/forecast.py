"""What `--dry_run --target CARD` prints: memory, attention, exchange between the cards, kernels and a bound of the speed."""

import collections
import math
import os
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from vit_jax.config import AUTO, Config, mesh_sizes
from vit_jax.config_rules import check, mixing_fields
from vit_jax.data.splits import names
from vit_jax.data.tasks import task
from vit_jax.errors import ConfigError, printable, reason
from vit_jax.files import expand_user, whole_file
from vit_jax.training import capacity, hlo, target
from vit_jax.training.cards import Card, card
from vit_jax.training.devices import nbytes
from vit_jax.training.preview import (
    describe_images,
    describe_shapes,
    duration,
    evaluated,
    evaluation_time,
    evaluations_of_a_state,
    training_flops,
    without_download,
)
from vit_jax.training.target import Plan, Target


def check_options(config: Config, card_name: str, count: int, path: str) -> Path | None:
    """Raises ConfigError for options that cannot be used; returns the file to write the program to, if one is asked for."""
    card(card_name)
    if config.run.parallel != "mesh":
        raise ConfigError(f"--target compiles for run.parallel=mesh, and run.parallel is {config.run.parallel!r}")
    if config.run.mesh and (product := math.prod(mesh_sizes(config.run.mesh).values())) != count:
        raise ConfigError(f"run.mesh = {config.run.mesh!r} is of {product} devices, and --devices is {count}")
    settings, together = config.training, 2 if (mixing := mixing_fields(config.augment)) else 1  # images on one device
    if count < 1 or settings.batch_size % (settings.grad_accum_steps * count * together):
        images, pairs = settings.batch_size // settings.grad_accum_steps, f" in pairs, which {mixing} mixes" if mixing else ""
        works = sorted((n for n in range(1, images + 1) if images % (n * together) == 0), key=lambda n: (abs(n - count), n))
        raise ConfigError(
            f"--devices {count}: training.batch_size = {settings.batch_size} in training.grad_accum_steps = "
            f"{settings.grad_accum_steps} does not divide among so many{pairs}; the nearest number that works is {works[0]}"
        )
    if not path:
        return None
    file = expand_user(path, "--hlo")
    if file.is_dir() or not file.parent.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise ConfigError(
            f"--hlo {printable(path)} cannot be written: name a file in a folder that exists and can be written to"
        )
    return file


def describe(config: Config, card_name: str, count: int = 1, hlo_path: str = "") -> str:
    """Compiles the programs of a run for `count` cards and describes them as text; progress is printed on standard error.

    Raises:
      ConfigError: if an option cannot be used, the plug-in is missing, or the run needs more memory than a card has.
    """
    check(config)
    path = check_options(config, card_name, count, hlo_path)
    target.check_plugin()
    chosen = card(card_name)
    with target.described(chosen, count) as devices:
        run = Target(without_download(config), devices)
        try:
            with ThreadPoolExecutor(1) as pool:  # both are compiled at once
                later = pool.submit(run.predict)
                step = _train_step(run)
                predict = later.result()
        except NotImplementedError as error:  # JAX's own check of what cuDNN's attention can do
            if config.model.attention != AUTO:
                raise ConfigError(f"model.attention = 'cudnn' is refused by JAX for this model ({reason(error)})") from None
            _say(f"XLA computes attention, because JAX refuses cuDNN's for this model ({reason(error)})")
            run = run.changed(model_attention="xla")
            step, predict = _train_step(run), run.predict()
        if path:
            with whole_file(path) as file:
                file.write(step.text.encode())
        memory = _memory_lines(run, chosen, step, predict)
        return "\n".join([*_shape_lines(run), *map(_wrap, [*memory, *_program_lines(run, chosen, step, predict)])])


def _wrap(line: str) -> str:
    return textwrap.fill(line, 120, subsequent_indent=" " * 12, break_on_hyphens=False)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _train_step(run: Target) -> Plan:
    settings = run.config.training
    parts = f" in {settings.grad_accum_steps} microbatches" if settings.grad_accum_steps > 1 else ""
    _say(f"compiling a training step of {settings.batch_size} images{parts}{', with run.remat' * run.config.run.remat}")
    return run.train_step()


def _needed(run: Target, step: Plan) -> float:
    """Bytes on each card during a training step, with the other splits and the best parameters, which lie there, too."""
    return step.arguments + step.temporary + nbytes(evaluated(run.data)) + nbytes(run.state.params)


def _needed_with(run: Target, **fields: Any) -> float:
    """The same of the run with other values of fields, compiled for it."""
    changed = run.changed(**fields)
    return _needed(changed, _train_step(changed))


def _shape_lines(run: Target) -> list[str]:
    slices = "[" in "".join(names(task(run.config.data.task), run.config.data))
    numbers = {kind: f"{number:,}" if number else "an unknown number of" for kind, number in run.images.items()}
    images = "at most " * slices + describe_images(numbers, run.data)
    return describe_shapes(run.config, run.model, run.state, images, run.layout)


def _memory_lines(run: Target, chosen: Card, step: Plan, predict: Plan) -> list[str]:
    """The memory plan and the largest batch; ConfigError with what would fit if the run does not."""
    settings, limit, needed = run.config.training, target.usable(chosen), _needed(run, step)
    state, best, others = nbytes(run.state), nbytes(run.state.params), evaluated(run.data)
    training, on_top = nbytes(run.data["training"]), ", ".join(f"the {k} images ({_gb(nbytes(v))})" for k, v in others.items())
    evaluating = state + training + nbytes(others) + best + predict.temporary
    # Gradients have the parameters' number and the type of the computation; all of them exist at the end of a step.
    together = 2 if mixing_fields(run.config.augment) else 1
    fixed = needed - step.temporary + best * (0.5 if run.config.model.dtype == "bfloat16" else 1)
    found = capacity.largest_batch(
        lambda images: _needed_with(run, training_batch_size=images),
        limit,
        unit=len(run.layout.devices) * settings.grad_accum_steps * together,
        known=(settings.batch_size, needed),
        fixed=fixed,
    )
    if needed > limit:
        raise ConfigError(_too_large(run, chosen, needed, found))
    if evaluating > limit:
        raise ConfigError(
            f"run.eval_batch_size = {run.config.run.eval_batch_size} needs {_gb(evaluating)} on each card, "
            f"{_gb(limit)} of {_gb(chosen.memory)} can be used: lower it"
        )
    images, most = found or (settings.batch_size, needed)
    return [
        f"memory      {_gb(step.arguments + step.temporary)} on each card for a training step: {_gb(state)} state, "
        f"{_gb(training)} training images, {_gb(step.temporary)} temporary",
        f"            {_gb(needed)} with {on_top} and the best parameters ({_gb(best)})",
        f"            {_gb(evaluating)} in an evaluation of {run.eval_batch_size} images ({_gb(predict.temporary)} temporary)",
        f"            by XLA's plan, without the libraries' own; JAX takes {_gb(limit)} of the card's {_gb(chosen.memory)}",
        f"largest     a batch of {images:,} images fits: {_gb(most)} by its compiled program",
    ]


def _too_large(run: Target, chosen: Card, needed: float, found: tuple[int, float] | None) -> str:
    """The error of a batch that does not fit: the largest that does, and whether remat or accumulation helps."""
    settings, count, limit = run.config.training, len(run.layout.devices), target.usable(chosen)
    hints = [f"the largest batch that fits is {found[0]:,}" if found else "no batch was found that fits"]
    changes: dict[str, dict[str, Any]] = {} if run.config.run.remat else {"run.remat=true": {"run_remat": True}}
    if found:
        images, together = settings.batch_size // count, 2 if mixing_fields(run.config.augment) else 1
        # Some less than the largest microbatch, because gradients are summed in memory of their own.
        least = 1.05 * settings.batch_size * settings.grad_accum_steps / found[0]
        if parts := next((n for n in range(math.ceil(least), images + 1) if images % (n * together) == 0), 0):
            changes[f"training.grad_accum_steps={parts}"] = {"training_grad_accum_steps": parts}
    for name, fields in changes.items():
        bytes_ = _needed_with(run, **fields)
        hints.append(f"{name} {'makes it fit' if bytes_ <= limit else 'is not enough'} ({_gb(bytes_)})")
    return (
        f"training.batch_size = {settings.batch_size} needs {_gb(needed)} on each {chosen.description}, of which "
        f"{_gb(limit)} can be used; by compiling: {'; '.join(hints)}"
    )


def _gb(bytes_: float) -> str:
    return f"{bytes_ / 1e9:.2f} GB" if bytes_ >= 1e8 else f"{bytes_ / 1e6:.0f} MB"


def _program_lines(run: Target, chosen: Card, step: Plan, predict: Plan) -> list[str]:
    """Attention, exchange, kernels, operations and the bound of the speed."""
    settings, count = run.config.training, len(run.layout.devices)
    kernels = step.kernels
    fused = collections.Counter("backward" if "Backward" in k.target else "forward" for k in kernels if k.kind == "attention")
    attention = (
        f"cuDNN: {fused['forward']} calls forward, {fused['backward']} backward" if fused else "XLA, forward and backward"
    )
    kinds = collections.Counter[str]()
    for kernel in kernels:
        kinds[kernel.kind] += kernel.times
    exchange = _exchange(hlo.collectives(step.module))
    products = sum(kernel.times * kernel.flops for kernel in kernels)
    model = settings.batch_size / count * training_flops(run.config, run.model)
    seconds = sum(kernel.seconds(chosen) for kernel in kernels)
    once, evaluations = sum(kernel.seconds(chosen) for kernel in predict.kernels), -(-settings.steps // settings.eval_every)
    once *= evaluations_of_a_state(run.config)
    passes = {kind: once * -(-number // run.eval_batch_size) for kind, number in evaluated(run.images).items()}
    evaluation, total = evaluation_time(passes, evaluations)
    return [
        f"attention   {attention.format_map(fused)}; computed in {run.config.model.dtype}",
        f"exchange    {'; '.join(exchange) or 'none, there is one card'}",
        f"kernels     {sum(kinds.values()):,} a step: "
        + ", ".join(f"{number:,} {kind}" for kind, number in kinds.most_common()),
        f"operations  {products / 1e12:.3g} TFLOP of products a step on each card; {model / 1e12:.3g} by the model's sizes",
        f"speed       at most {settings.batch_size / seconds:,.0f} images/s, at least {1e3 * seconds:.1f} ms a step: an upper "
        f"estimate, no measurement: every kernel reaches {hlo.BANDWIDTH_SHARE:.0%} of {chosen.bandwidth / 1e9:,.0f} GB/s, "
        f"{hlo.PRODUCT_SHARE:.0%} of {chosen.bfloat16 / 1e12:,.0f} TFLOP/s in bfloat16, or one elementwise operation a clock "
        "and float32 unit; launches and the exchange cost nothing",
        f"evaluation  at least {duration(evaluation)}, {evaluations:,} of them, by the same estimate",
        f"run         {settings.steps:,} steps, at least {duration(settings.steps * seconds + total)}",
    ]


def _exchange(found: list[hlo.Collective]) -> list[str]:
    """The number of exchanges of each kind, the bytes of their results on a card, and how many hide behind kernels."""
    lines = []
    for opcode in dict.fromkeys(collective.opcode for collective in found):
        chosen = [collective for collective in found if collective.opcode == opcode]
        types = sorted({kind for collective in chosen for kind in collective.types})
        hidden = sum(collective.asynchronous and collective.meanwhile > 0 for collective in chosen)
        size = sum(collective.bytes for collective in chosen) / 1e6
        lines.append(f"{len(chosen)} {opcode} of {size:,.1f} MB in {'+'.join(types)}, {hidden} of them while kernels run")
    return lines
