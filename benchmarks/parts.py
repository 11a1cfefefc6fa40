"""What can be measured, a function each, and the suites of a kind of machine: PARTS and SUITES are the tables."""

import argparse
import contextlib
import functools
import importlib.util
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from benchmarks import data
from benchmarks.contestants import SEED, Ours, Work, by_turns, compare
from benchmarks.measure import ROOT, Result, environment, ratio, repeated, say
from vit_jax.config import Config
from vit_jax.errors import UserError
from vit_jax.models.variants import build, shapes
from vit_jax.training import loop
from vit_jax.training.evaluate import predictions


def _missing_packages() -> list[str]:
    """A note if this machine cannot run main.py because packages of requirements.txt are not installed."""
    installed = all(importlib.util.find_spec(name) for name in ("tensorflow_datasets", "array_record", "orbax", "tensorboardX"))
    return [] if installed else ["main.py is skipped: pip install -r requirements.txt installs what it needs"]


def _evaluation(options: argparse.Namespace) -> Result:
    """An evaluation pass over a resident test split, next to as many bare forward passes."""
    work = Work.of(options, "inference")
    run, passes = Ours(work, options.images), -(-options.images // work.batch)
    params, (batch, _, _) = run.layout.put(run.state.params), next(run.feed.evaluation(work.batch))
    forward = repeated(lambda: run.predict(params, batch, run.feed.data))
    whole = repeated(lambda: predictions(run.predict, params, run.feed, work.batch))
    timings, _ = by_turns({"pass": whole, "bare": lambda n: forward(n * passes)}, options)
    seconds = statistics.median(timings["pass"])
    row = dict(model=work.model, size=work.size, batch=work.batch, dtype=work.dtype, images=options.images)
    row |= dict(seconds=seconds, images_per_second=options.images / seconds, full=ratio(timings["pass"], timings["bare"]))
    return Result([row])


def _weights(model: Any, size: int, path: Path) -> str:
    """Writes random weights as a checkpoint; returns its path."""
    draw, flat = np.random.default_rng(SEED), flatten_dict(shapes(model, size), sep="/")
    np.savez(path, **{name: draw.standard_normal(leaf.shape, np.float32) * np.float32(0.02) for name, leaf in flat.items()})
    return str(path)


def _main_until(path: Path, *arguments: str, **variables: str) -> float:
    """Seconds from the start of main.py until it has written something to `path`; main.py is then ended."""
    say(f"running main.py {' '.join(arguments)}")
    command, env, began = [sys.executable, "main.py", *arguments], environment(**variables), time.perf_counter()
    with tempfile.TemporaryFile("w+") as log, subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log) as process:
        try:
            while not (path.exists() and path.stat().st_size):
                if process.poll() is not None:
                    log.seek(0)
                    raise UserError(f"main.py ended with status {process.returncode}: {log.read().strip()[-300:]}")
                time.sleep(0.01)
            return time.perf_counter() - began
        finally:
            process.kill()


def _import(statement: str, n: int) -> float:
    """Seconds of a statement in n fresh interpreters."""
    code = f"import time; began = time.perf_counter(); {statement}; print(time.perf_counter() - began)"
    command, env = [sys.executable, "-c", code], environment()
    return sum(float(subprocess.run(command, env=env, capture_output=True, check=True).stdout) for _ in range(n))


def _startup(options: argparse.Namespace) -> Result:
    """Imports, and main.py from the command to the end of its first step, with a cold and a warm cache of programs."""
    first = "import jax, flax.linen, optax"
    statements = (first, "import vit_jax", "import vit_jax; vit_jax.train, vit_jax.load, vit_jax.Config")
    timings, _ = by_turns({name: functools.partial(_import, name) for name in statements}, options)
    rows = list[dict[str, Any]]()
    for name, seconds in timings.items():
        rows.append(dict(name=name, seconds=statistics.median(seconds), of_base=ratio(timings[first], seconds)))
    if notes := _missing_packages():
        return Result(rows, notes)
    with tempfile.TemporaryDirectory() as folder:
        weights = _weights(Work.of(options, "train").build(), options.size, Path(folder) / "weights.npz")
        fields = {"model.checkpoint": weights, "data.image_size": options.size, "training.batch_size": options.batch}
        fields |= {"model.dtype": options.dtype, "training.save_every": 1}  # a save writes metrics.jsonl
        arguments = ["--config=configs/demo.py", *(f"--config.{field}={value}" for field, value in fields.items())]
        for cache, number in (("cold", 1), ("warm", min(3, options.rounds))):
            runs = [Path(folder) / f"{cache}{i}" for i in range(number)]
            variables = dict(VIT_JAX_CACHE=f"{folder}/cache")
            seconds = [_main_until(run / "metrics.jsonl", *arguments, f"--workdir={run}", **variables) for run in runs]
            row = dict(name=f"main.py, {cache} cache, {options.model} at {options.size} px")
            rows.append(row | dict(seconds=statistics.median(seconds)))
    return Result(rows)


def _loop(options: argparse.Namespace) -> Result:
    """The training loop around a model of one block of width 8, next to only its step."""
    if notes := _missing_packages():
        return Result([], notes)
    model, devices = build("B/8", hidden_size=8, num_layers=1, num_heads=1, mlp_dim=8, num_classes=10), jax.local_device_count()
    config = Config(seed=SEED)
    with tempfile.TemporaryDirectory() as name:
        config.model.checkpoint = _weights(model, 8, Path(name) / "tiny.npz")
        config.data.task, config.data.image_size = "cifar100_excerpt", 8
        config.data.train_split, config.data.test_split = "train[:64]", "test[:8]"
        config.training.steps = config.training.eval_every = config.training.save_every = options.steps
        config.training.batch_size = devices
        with contextlib.redirect_stderr(io.StringIO()):  # the progress bar
            loop.train(config, Path(name) / "run")
        lines = [json.loads(line) for line in (Path(name) / "run" / "metrics.jsonl").read_text().splitlines()]
        seconds = [devices / line["train/images_per_second"] for line in lines[1:-1]]  # the first compiles, the last evaluates
    step, _ = Ours(Work("train", "B/8", 8, devices), 64, model).contestant()
    step(10)
    n, mean = max(1, options.steps // 4), statistics.mean(seconds)
    alone = statistics.median(step(n) / n for _ in range(5))
    row = dict(steps=options.steps, seconds=statistics.median(seconds), mean=mean, steps_per_second=1 / mean)
    return Result([row | dict(alone=alone, overhead=mean - alone)])


# The parts that start processes come first: after the others this process holds the device.
PARTS: dict[str, Callable[[argparse.Namespace], Result]] = {
    "train": functools.partial(compare, "train"),
    "inference": functools.partial(compare, "inference"),
    "startup": _startup,
    "evaluation": _evaluation,
    "loop": _loop,
    "data": data.measure,
}
_CPU = "train inference --batch 8 --peer timm,original --model"
_GPU, _BEST = "--model B/16 --dtype bfloat16", "timm+bf16+compile+channels_last"
_TIMM = f"timm+bf16,timm+bf16+compile,{_BEST}"
# Suite → part → arguments.
SUITES = {
    "cpu": {
        "ti16": f"{_CPU} Ti/16",
        "s16": f"{_CPU} S/16",
        "b16": f"{_CPU} B/16",
        "evaluation": "evaluation --model Ti/16 --batch 16 --images 128",
        "startup": "startup --model B/16 --batch 1",
        "data": "data --rounds 5",
        "loop": "loop",
    },
    "gpu": {
        "train-256": f"train {_GPU} --batch 256 --peer {_TIMM}",
        "train-512": f"train {_GPU} --batch 512 --peer {_BEST}",
        "train-1024": f"train {_GPU} --batch 1024 --grad_accum_steps 2",
        "inference-256": f"inference {_GPU} --batch 256 --peer {_TIMM}",
        "attention": f"train {_GPU} --batch 256 --attention cudnn,xla",
        "evaluation": f"evaluation {_GPU} --batch 256",
        "loop": "loop",
        "startup": f"startup {_GPU} --batch 64",
    },
}
LIMITS = {"cpu": (3600, 4 * 3600), "gpu": (420, 25 * 60)}  # seconds that a part may take, and the whole suite
