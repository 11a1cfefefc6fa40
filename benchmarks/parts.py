"""What can be measured: a function each, from options to a Result. PARTS is the table."""

import argparse
import contextlib
import io
import json
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from benchmarks import compare, memory
from benchmarks.compare import by_turns, work_of
from benchmarks.measure import Contestant, ContestantError, Result, Skipped, interleave, ratio, say, timed
from benchmarks.ours import SEED, Ours
from benchmarks.processes import ROOT, environment
from vit_jax.config import Augment
from vit_jax.data.prepare import prepare
from vit_jax.data.tasks import find_prepared, task
from vit_jax.models.variants import build, shapes
from vit_jax.models.vit import VisionTransformer
from vit_jax.training.evaluate import predictions
from vit_jax.training.feed import fetch
from vit_jax.training.step import AUGMENT, stream
from vit_jax.transforms import geometry
from vit_jax.transforms.preprocess import example_keys, for_training

# --- What surrounds the step --------------------------------------------------------------------------------------------------


def _evaluation(options: argparse.Namespace) -> Result:
    """A pass over a resident test split, beside as many bare forward passes."""
    work = work_of(options, "inference")
    ours = Ours(work, options.images)
    predict, params, passes = ours.predict(), ours.layout.put(ours.params), -(-options.images // work.batch)
    batch, _, _ = next(ours.feed.evaluation(work.batch))

    def bare(n: int) -> None:
        for _ in range(n * passes):
            logits = predict(params, batch, ours.feed.data)
        jax.block_until_ready(logits)

    def whole(n: int) -> None:
        for _ in range(n):
            predictions(predict, params, ours.feed, work.batch)

    timings, _ = by_turns({"bare": timed(bare), "pass": timed(whole)}, options)
    row = dict(model=work.model, size=work.size, batch=work.batch, dtype=work.dtype, images=options.images)
    seconds = timings["pass"].median
    row |= dict(seconds=seconds, images_per_second=options.images / seconds, full=ratio(timings["pass"], timings["bare"]))
    return Result("evaluation", [row])


def by_gathers(images: jax.Array, boxes: jax.Array, size: int, flip: jax.Array) -> jax.Array:
    """What geometry.crop_resize computes by products of matrices, from the four neighbours of every pixel instead."""

    def taps(start: jax.Array, extent: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        position = jnp.clip((jnp.arange(size) + 0.5) * (extent / size) - 0.5, 0, extent - 1)
        before = jnp.floor(position).astype(jnp.int32)
        return start + before, start + jnp.minimum(before + 1, extent - 1), position - before

    def one(image: jax.Array, box: jax.Array, mirrored: jax.Array) -> jax.Array:
        top, bottom, down = taps(box[0], box[2])
        left, right, along = taps(box[1], box[3])
        down, along, image = down[:, None, None], along[None, :, None], image.astype(jnp.float32)
        rows = image[top] * (1 - down) + image[bottom] * down
        found = rows[:, left] * (1 - along) + rows[:, right] * along
        return jnp.where(mirrored, found[:, ::-1], found)

    return jax.vmap(one)(images, boxes, flip)


def _input(options: argparse.Namespace) -> Result:
    """Cropping, flipping, resizing and scaling on the device, beside the training step that they are part of."""
    work = work_of(options, "train")
    ours = Ours(work)
    index = np.arange(work.batch, dtype=np.int32)
    batch = ours.layout.put_batch({"index": index, "place": index})

    def transforms(resize: Callable[..., jax.Array]) -> Contestant:
        def forward(params, batch, data):
            images, labels = fetch(data, batch)
            with mock.patch.object(geometry, "crop_resize", resize):  # while it is traced
                transform = for_training(Augment(), work.size)
                return transform(example_keys(stream(SEED, AUGMENT), 0, batch["place"]), images, labels)[0]

        alone = ours.layout.evaluate(forward)

        def run(n: int) -> None:
            for _ in range(n):
                images = alone(None, batch, ours.feed.data)
            jax.block_until_ready(images)

        return timed(run)

    ways = {"products, as a run does": transforms(geometry.crop_resize), "gathers": transforms(by_gathers)}
    step, _ = ours.training()
    timings, _ = by_turns({"step": step, **ways}, options)
    rows = []
    for way in ways:
        row = dict(model=work.model, size=work.size, batch=work.batch, dtype=work.dtype, way=way)
        seconds = timings[way].median
        row |= dict(seconds=seconds, images_per_second=work.batch / seconds, share=ratio(timings["step"], timings[way]))
        rows.append(row)
    return Result("input", rows)


def _bare(statement: str) -> Contestant:
    """A fresh interpreter that times a statement."""
    code = f"import time; began = time.perf_counter(); {statement}; print(time.perf_counter() - began)"

    def run(n: int) -> float:
        return sum(float(_output([sys.executable, "-c", code], statement).split()[-1]) for _ in range(n))

    return run


def _output(command: list[str], what: str, **more: str) -> str:
    done = subprocess.run(command, cwd=ROOT, env=environment(**more), capture_output=True, text=True)
    if done.returncode:
        raise ContestantError(f"{what} failed: {(done.stderr.strip().splitlines() or ['without a word'])[-1][:300]}")
    return done.stdout


def _needs(*packages: str) -> None:
    for package in packages:
        try:
            __import__(package)
        except ImportError:
            raise Skipped(f"needs {package}, which is not installed: pip install -r requirements.txt") from None


def _startup(options: argparse.Namespace) -> Result:
    """Imports, and main.py from the command to the first step, with a cold and with a warm cache of programs."""
    rows: list[dict[str, Any]] = []
    statements = {
        "import jax, flax.linen, optax": "import jax, flax.linen, optax",
        "import vit_jax": "import vit_jax",
        "import vit_jax and what training needs": "import vit_jax; vit_jax.train, vit_jax.load, vit_jax.Config",
    }
    contestants = {name: _bare(statement) for name, statement in statements.items()}
    timings, _ = interleave(contestants, max(3, options.rounds))
    base, *_ = timings.values()
    rows += [dict(name=name, seconds=timing.median, of_base=ratio(base, timing)) for name, timing in timings.items()]
    try:
        _needs("tensorflow_datasets", "array_record", "ml_collections")
    except Skipped as reason:
        return Result("startup", rows, [f"main.py is skipped: {reason}"])
    marks = dict[str, list[dict[str, float]]]()
    with tempfile.TemporaryDirectory() as folder:
        _weights(work_of(options, "train").build(), options.size, Path(folder) / "weights.npz")
        command = [sys.executable, "-m", "benchmarks.startup", "--config", "configs/demo.py"]
        command += [f"--config.model.checkpoint={folder}/weights.npz", f"--config.data.image_size={options.size}"]
        command += [f"--config.training.batch_size={options.batch}", f"--config.model.dtype={options.dtype}"]
        for number, name in enumerate(("cold", "warm", "warm", "warm")):
            say(f"main.py to its first step, {name} cache")
            more = {"VIT_JAX_CACHE": f"{folder}/cache", "VIT_JAX_BEGAN": repr(time.time())}
            whole = [*command, f"--workdir={folder}/run{number}"]
            marks.setdefault(name, []).append(json.loads(_output(whole, "main.py", **more).splitlines()[-1]))
    for name, found in marks.items():
        middle = {mark: statistics.median(one[mark] for one in found) for mark in found[0]}
        rows.append({"name": f"main.py, {name} cache", "model": options.model, "size": options.size, "marks": middle})
    return Result("startup", rows)


def _weights(model: VisionTransformer, size: int, path: Path) -> None:
    """Random weights as a checkpoint."""
    draw = np.random.default_rng(SEED)
    flat = flatten_dict(shapes(model, size), sep="/")
    np.savez(path, **{name: draw.standard_normal(leaf.shape, np.float32) * np.float32(0.02) for name, leaf in flat.items()})


def _loop(options: argparse.Namespace) -> Result:
    """The product's loop around a model of almost nothing: what a step costs beside its computation."""
    _needs("tensorflow_datasets", "array_record", "orbax.checkpoint", "tensorboardX")
    from vit_jax.config import Config
    from vit_jax.training import devices, journal, loop
    from vit_jax.training.assemble import assemble

    steps = options.steps
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "tiny.npz"
        tiny = build("B/8", hidden_size=8, num_layers=1, num_heads=1, mlp_dim=8, num_classes=10)
        _weights(tiny, 8, weights)
        config = Config(seed=SEED)
        config.model.checkpoint, config.data.task, config.data.image_size = str(weights), "cifar100_excerpt", 8
        config.data.train_split, config.data.test_split = "train[:64]", "test[:8]"
        config.training.steps, config.training.batch_size = steps, jax.local_device_count()
        config.training.eval_every = config.training.save_every = steps
        with contextlib.redirect_stderr(io.StringIO()):  # the bar
            began = time.perf_counter()
            loop.train(config, Path(folder) / "run")
            whole = time.perf_counter() - began
        lines = journal.read(Path(folder) / "run")
        taken = [config.training.batch_size / line["train/images_per_second"] for line in lines[1:-1]]
        looped = statistics.median(taken)
        layout = devices.start(config.run)
        parts = assemble(config, layout)
        state, batches = layout.put(parts.state()), parts.train_feed.train(config.training.batch_size, 1, SEED, 0)

        def dispatched(n: int) -> None:
            nonlocal state
            for _ in range(n):
                state, _ = parts.program.train_step(state, next(batches), parts.train_feed.data)
            jax.block_until_ready(state)

        bare = timed(dispatched)
        bare(10)
        alone = statistics.median(bare(steps // 4) / (steps // 4) for _ in range(5))
    mean = statistics.mean(taken)
    row = dict(steps=steps, seconds=looped, mean=mean, steps_per_second=1 / mean, alone=alone, overhead=mean - alone)
    return Result("loop", [row | {"whole": whole}])


# --- A whole run ------------------------------------------------------------------------------------------------------------


def _random_cifar100(folder: Path) -> None:
    """CIFAR-100's shape prepared for TFDS as `vit_jax.data prepare` does it: random images in the official layout."""
    row = task("cifar100")
    archive, draw = row.archive, np.random.default_rng(SEED)
    assert archive
    with tarfile.open(folder / "random.tar", "w") as tar:

        def add(name: str, content: bytes) -> None:
            info = tarfile.TarInfo(f"{archive.folder}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))

        for file, count in archive.labels.values():
            add(file, "".join(f"class_{i}\n" for i in range(count)).encode())
        for split, files in archive.files.items():
            number = archive.examples[split] // len(files)
            for file in files:
                labels = [draw.integers(0, count, (number, 1), np.uint8) for _, count in archive.labels.values()]
                add(file, np.hstack([*labels, draw.integers(0, 256, (number, 3072), np.uint8)]).tobytes())
    prepare(row, folder / "random.tar", folder)


def _run(options: argparse.Namespace) -> Result:
    """All of configs/cifar100_b16.py by its command, from random weights of the same size."""
    _needs("tensorflow_datasets", "array_record", "ml_collections", "orbax.checkpoint", "tensorboardX")
    with tempfile.TemporaryDirectory() as name:
        folder, data = Path(name), options.data_dir
        official = find_prepared(task("cifar100"), data) is not None
        if not official:
            say("CIFAR-100 is not prepared here: random images of its shape take its place")
            _random_cifar100(folder)
            data = str(folder)
        command = [sys.executable, "main.py", "--config", "configs/cifar100_b16.py", "--config.model.checkpoint="]
        command += ["--config.model.variant=B/16", f"--config.run.data_dir={data}", *options.overrides]
        say(f"running main.py --config configs/cifar100_b16.py {' '.join(options.overrides)}")
        began = time.perf_counter()
        with open(folder / "log", "wb") as log:
            process = subprocess.Popen(
                [*command, f"--workdir={folder}/run"], cwd=ROOT, env=environment(), stdout=log, stderr=log
            )
            try:
                weights = None
                while process.poll() is None:
                    if weights is None and (folder / "run" / "final.npz").exists():
                        weights = time.perf_counter() - began
                    time.sleep(0.02)
            finally:
                process.kill()
                process.wait()
        whole = time.perf_counter() - began
        if process.returncode:
            lines = (folder / "log").read_text(errors="replace").strip().splitlines()
            raise ContestantError(f"main.py ended with status {process.returncode}: {(lines or [''])[-1][:300]}")
        steps = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    rates = [line["train/images_per_second"] for line in steps if "train/images_per_second" in line]
    row = dict(seconds=weights or whole, whole=whole, steps=len(steps), images_per_second=statistics.median(rates))
    row |= dict(evaluations=sum("test/accuracy" in line for line in steps), data="CIFAR-100" if official else "random")
    return Result("run", [row | {"overrides": " ".join(options.overrides)}])


# Those that start processes of their own come first: after the others this process holds the device.
PARTS: dict[str, Callable[[argparse.Namespace], Result]] = {
    "train": compare.train,
    "inference": compare.inference,
    "startup": _startup,
    "run": _run,
    "evaluation": _evaluation,
    "input": _input,
    "loop": _loop,
    "memory": memory.table,
}
