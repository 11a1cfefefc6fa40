"""The contestants: this package, timm and the original, each in its own process.

`python -m benchmarks.contestants WORK.json` runs ours. Its images are random uint8 of 32×32 that lie on the device; they are
cropped, flipped, resized and scaled in every step, as in a run.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import statistics
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import ROOT, Process, Result, environment, interleave, ratio, repeated
from benchmarks.peer_process import Timed, report_jax, serve
from vit_jax import runtime
from vit_jax.config import Augment, Model, Optimizer, Run
from vit_jax.errors import UserError
from vit_jax.models.variants import build, flops
from vit_jax.models.vit import VisionTransformer
from vit_jax.training import devices, feed, program, state
from vit_jax.training import optimizer as optimizers
from vit_jax.transforms.keys import INIT, stream

SEED, CLASSES = 0, 100
# Name → (how its process is started, what may follow its name, as in timm+bf16).
_PEER = ["-P", str(ROOT / "benchmarks" / "peer_process.py")]
CONTESTANTS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "vit_jax": (["-m", "benchmarks.contestants"], ()),
    "timm": (_PEER, ("bf16", "compile", "channels_last")),
    "original": (_PEER, ()),
}


@dataclasses.dataclass(frozen=True)
class Work:
    """What is timed: a training step or a forward pass ("inference") of a batch."""

    kind: str
    model: str = "B/16"
    size: int = 224
    batch: int = 64
    dtype: str = "float32"
    attention: str = "auto"
    remat: bool = False
    grad_accum_steps: int = 1

    @classmethod
    def of(cls, options: argparse.Namespace, kind: str, attention: str = "") -> "Work":
        """The work that a command line asks for; `attention` replaces the first one that it names."""
        fields = (options.model, options.size, options.batch, options.dtype, attention or options.attention[0])
        return cls(kind, *fields, options.remat, options.grad_accum_steps)

    def build(self) -> VisionTransformer:
        """The model, with XLA's attention; ValueError if there is none, or if its patches do not divide the images."""
        model = build(self.model, num_classes=CLASSES, dtype=jnp.dtype(self.dtype), remat=self.remat)
        if self.size % model.stride:
            raise ValueError(f"--size {self.size}: {self.model} divides an image into patches of {model.stride} pixels")
        return model


class RandomImages:
    """A data.sources.Source of random images uint8 [N, 32, 32, 3] in memory."""

    def __init__(self, number: int, classes: int):
        draw = np.random.default_rng(SEED)
        images, labels = draw.integers(0, 256, (number, 32, 32, 3), np.uint8), draw.integers(0, classes, number, np.int32)
        self.number, self.nbytes, self.read = number, images.nbytes, lambda index: (images[index], labels[index], None)

    def __len__(self) -> int:
        return self.number


class Ours:
    """The product's own step and forward pass, built as a run builds them; `model` replaces the one that the work names."""

    def __init__(self, work: Work, num_images: int = 10_000, model: Any = None):
        model = model or work.build()
        self.work, self.layout = work, devices.start(Run())
        self.layout.check(work.batch, work.grad_accum_steps)
        images = jnp.zeros((1, work.size, work.size, 3))
        params = jax.jit(lambda key: model.init(key, images)["params"])(stream(SEED, INIT))
        tokens = params["Transformer"]["posembed_input"]["pos_embedding"].shape[1]
        settings = Model(variant=work.model, dtype=work.dtype, attention=work.attention)
        self.attention = runtime.resolve_auto(settings, model, tokens).attention
        model = model.clone(attention=self.attention)
        optimizer = optimizers.build(Optimizer(learning_rate=1e-3), 1_000_000)  # clipping, SGD, momentum in bfloat16
        self.state = state.create(params, optimizer)  # not yet on the devices
        programs = program.build(model, Augment(), optimizer, self.layout, SEED, work.size)
        self.step, self.predict = programs.train_step, programs.predict
        self.feed = feed.Feed(RandomImages(num_images, model.num_classes), self.layout, sys.maxsize)  # type: ignore[arg-type]

    def contestant(self) -> Timed:
        """Steps or forward passes one after the other; the device is waited for only at the end, as in a run."""
        work, data, train = self.work, self.feed.data, self.work.kind == "train"
        compiled: Any = self.step if train else self.predict
        current = self.layout.put(self.state if train else self.state.params)
        batch, _, _ = next(self.feed.evaluation(work.batch))
        batches = self.feed.train(work.batch, work.grad_accum_steps, SEED, 0) if train else itertools.repeat(batch)

        def unit() -> Any:
            nonlocal current
            result = compiled(current, next(batches), data)
            current = result[0] if train else current
            return result

        def about() -> dict[str, Any]:
            found = report_jax(self.layout.devices[0], "jax", "flax", "optax")
            plan = compiled.lower(current, next(batches), data).compile().memory_analysis()
            sizes = (plan.argument_size_in_bytes, plan.temp_size_in_bytes, plan.output_size_in_bytes, -plan.alias_size_in_bytes)
            return found | {"attention": self.attention, "planned": sum(sizes)}

        return repeated(unit), about


def by_turns(contestants: dict[str, Any], options: argparse.Namespace) -> tuple[dict[str, list[float]], dict[str, str]]:
    """`interleave` as a command line asks for. On a GPU, whose steps are short, a turn lasts half a second at least."""
    least = 0.5 if runtime.has_nvidia_driver() else 0.0
    return interleave(contestants, options.rounds, warmup=2, least=least, pause=0.3)


def compare(kind: str, options: argparse.Namespace) -> Result:
    """One row for each --attention of ours and one for each peer, timed by turns in processes that run side by side."""
    work, python = Work.of(options, kind), options.peer_python or sys.executable
    model, choices = work.build(), options.attention
    operations = (3 if kind == "train" else 1) * work.batch * flops(model, work.size)
    geometry = {f.name: getattr(model, f.name) for f in dataclasses.fields(model) if f.name not in ("parent", "name", "dtype")}
    task = json.dumps({"kind": kind, "size": work.size, "batch": work.batch, "geometry": geometry})
    commands = {}
    for choice in choices:
        ours = json.dumps(dataclasses.asdict(Work.of(options, kind, choice)))
        commands["vit_jax" + f" ({choice})" * (len(choices) > 1)] = [sys.executable, *CONTESTANTS["vit_jax"][0], ours]
    mine = list(commands)
    for name in options.peer:
        commands[name] = [python, *CONTESTANTS[name.split("+")[0]][0], name, task, options.original]
    env = environment(XLA_PYTHON_CLIENT_PREALLOCATE="false")  # a GPU's memory is shared by all contestants
    with contextlib.ExitStack() as stack:
        running = {name: Process(name, command, env) for name, command in commands.items()}
        for process in running.values():
            stack.callback(process.close)
        timings, failures = by_turns(running, options)
        if mine[0] in failures:
            raise UserError(failures[mine[0]])
        abouts = {name: running[name].ask("about") for name in timings}
    rows = []
    for name, seconds in timings.items():
        about, dtype, median = abouts[name], "bfloat16" if "bf16" in name else "float32", statistics.median(seconds)
        low, high = np.percentile(seconds, (25, 75)).tolist()
        row: dict[str, Any] = dict(name=name, model=work.model, size=work.size, batch=work.batch)
        row |= dict(dtype=work.dtype if name in mine else dtype, attention=about.get("attention"), remat=work.remat)
        row |= dict(accumulation=work.grad_accum_steps, rounds=len(seconds), seconds=median, seconds_low=low, seconds_high=high)
        row |= dict(images_per_second=work.batch / median, flops=operations, flops_per_second=operations / median)
        row |= dict(memory=about["memory"], planned=about.get("planned"))
        rows.append(row | dict(ratio=ratio(timings[mine[0]], seconds) if name != mine[0] else None))
    versions = {package: version for about in abouts.values() for package, version in about["versions"].items()}
    return Result(rows, [f"{name} is not included: {why}" for name, why in failures.items()], versions)


if __name__ == "__main__":
    runtime.prepare()
    serve(lambda: Ours(Work(**json.loads(sys.argv[1]))).contestant())
